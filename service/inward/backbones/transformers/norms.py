"""RMSNorm in one operation instead of six.

transformers writes it out, in float32 copies of the stream: on a CPU 1.9 ms for 1,024 tokens of width 896 against 0.7
ms for torch's own, 49 times in a model of 24 blocks.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.nn.functional import rms_norm


def fuse_norms(base: torch.nn.Module) -> int:
    """Lets every RMSNorm that computes what torch's does (shown on random numbers; Gemma's, for one, does not) use
    it; says how many.
    """
    fused = 0
    for module in base.modules():
        weight = getattr(module, "weight", None)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if (
            type(module).__name__.endswith("RMSNorm")
            and isinstance(weight, torch.nn.Parameter)
            and isinstance(eps, float)
        ):
            forward = partial(_forward, weight, eps)
            if _agree(module, forward, weight):
                module.forward = forward
                fused += 1
    return fused


def _forward(weight: torch.Tensor, eps: float, hidden_states: torch.Tensor) -> torch.Tensor:
    return rms_norm(hidden_states, weight.shape, weight, eps)


@torch.inference_mode()
def _agree(module: torch.nn.Module, forward: partial[torch.Tensor], weight: torch.Tensor) -> bool:
    """On numbers of ordinary size and on tiny ones, where ``eps`` matters. They may differ by one rounding."""
    sample = torch.randn((8, weight.shape[-1]), generator=torch.Generator().manual_seed(0)).to(weight)
    for scale in (1.0, 1e-3):
        theirs, ours = module(sample * scale), forward(sample * scale)
        if theirs.dtype != ours.dtype or not torch.allclose(
            theirs, ours, rtol=4 * torch.finfo(ours.dtype).eps, atol=1e-6
        ):
            return False
    return True
