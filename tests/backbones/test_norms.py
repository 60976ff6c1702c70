from __future__ import annotations

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from inward.backbones.transformers.norms import fuse_norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_that_is_torchs_own_is_fused_without_changing_its_numbers(dtype: torch.dtype) -> None:
    model = torch.nn.Sequential(Qwen2RMSNorm(64)).to(dtype)
    torch.nn.init.normal_(model[0].weight)
    x = torch.randn(5, 64, dtype=dtype)
    before = model(x)
    assert fuse_norms(model) == 1
    torch.testing.assert_close(model(x), before, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


def test_a_norm_that_computes_something_else_is_left_alone() -> None:
    model = torch.nn.Sequential(GemmaRMSNorm(64))
    torch.nn.init.normal_(model[0].weight)
    x = torch.randn(5, 64)
    before = model(x)
    assert fuse_norms(model) == 0
    torch.testing.assert_close(model(x), before)
