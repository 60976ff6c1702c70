"""What is read of an adapter on disk, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from inward.backbones.peft_files import check_shapes, read_adapter
from inward.errors import InvalidField
from support.adapters import Q_PROJ, write_adapter

MODULE = Q_PROJ.removeprefix("base_model.model.")
A, B = f"{Q_PROJ}.lora_A.weight", f"{Q_PROJ}.lora_B.weight"


def test_matrices_and_scale_are_those_of_the_files(tmp_path: Path) -> None:
    adapter = read_adapter(write_adapter(tmp_path / "a"))
    module = adapter.modules[MODULE]
    assert (module.a, module.b, module.rank, module.inputs, module.outputs, module.scale) == (A, B, 2, 16, 16, 2.0)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"lora_alpha": 6}, 3.0),
        ({"use_rslora": True}, 4 / math.sqrt(2)),
        ({"alpha_pattern": {"q_proj": 10}}, 5.0),
        ({"alpha_pattern": {"layers.0.self_attn.q_proj": 10}}, 5.0),
        ({"alpha_pattern": {"k_proj": 10, "proj": 10}}, 2.0),
        ({"alpha_pattern": {r"^model\.layers\.[0-9]+\.self_attn\.(q|k)_proj$": 10}}, 5.0),
        ({"alpha_pattern": {r"layers\.\d+\..*q_proj": 10}}, 5.0),
        ({"alpha_pattern": {"v_proj|q_proj": 10}}, 5.0),
    ],
    ids=str,
)
def test_the_scale_is_alpha_by_rank_however_it_is_given(config: dict[str, Any], scale: float, tmp_path: Path) -> None:
    assert read_adapter(write_adapter(tmp_path / "a", **config)).modules[MODULE].scale == pytest.approx(scale)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"peft_type": "IA3"}, "no LoRA"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "biases"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"something_new": {"a": 1}}, "something_new"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"lora_alpha": True}, "lora_alpha"),
        ({"lora_alpha": math.nan}, "lora_alpha"),
        ({"alpha_pattern": {"q_proj": math.inf}}, "lora_alpha"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern is no object"),
        ({"alpha_pattern": {"[": 1}}, "'.', which is no simple pattern"),
        ({"alpha_pattern": {"": 1}}, "no simple pattern"),
        ({"alpha_pattern": {"[z-a]": 1}}, "no simple pattern"),
        ({"alpha_pattern": {"*q_proj": 1}}, "no simple pattern"),
        ({"alpha_pattern": {"(a+)+": 1}}, "no simple pattern"),
        ({"alpha_pattern": {".*.*.*.*.*.*x": 1}}, "no simple pattern"),
        ({"alpha_pattern": {"(a|a)" * 40: 1}}, "no simple pattern"),
        ({"alpha_pattern": {"(?P<x>a)(?(x)b|c)": 1}}, "no simple pattern"),
    ],
    ids=str,
)
def test_what_is_more_than_plain_lora_is_refused_by_its_name(config: dict[str, Any], why: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidField, match=why):
        read_adapter(write_adapter(tmp_path / "a", **config))


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ({}, "no matrices"),
        ({A: (2, 16)}, "only matrix A"),
        ({A: (2, 16), B: (16, 3)}, "do not go together"),
        ({A: (2, 16), B: (16, 2, 1)}, "do not go together"),
        ({A: (2, 16), B: (16, 2), f"{Q_PROJ}.lora_magnitude_vector": (16,)}, "magnitude"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": (2, 16)}, "embedding"),
    ],
    ids=["none", "no b", "ranks", "dimensions", "dora", "embedding"],
)
def test_matrices_that_make_no_lora_are_refused(tensors: dict[str, Any], why: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidField, match=why):
        read_adapter(write_adapter(tmp_path / "a", tensors=tensors))


def test_what_is_missing_damaged_or_pickled_is_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    (folder / "adapter_config.json").write_text("[1]")
    with pytest.raises(InvalidField, match="no LoRA"):
        read_adapter(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(InvalidField, match="cannot be read as JSON"):
        read_adapter(folder)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (folder / "adapter_model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(InvalidField, match="damaged"):
        read_adapter(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InvalidField, match="holds no adapter_model"):
        read_adapter(folder)
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(InvalidField, match="pickled form"):
        read_adapter(folder)


def test_matrices_of_another_model_do_not_fit(tmp_path: Path) -> None:
    adapter = read_adapter(write_adapter(tmp_path / "a", tensors={A: (2, 16), B: (24, 2)}))
    check_shapes(adapter, {MODULE: (24, 16)})
    check_shapes(adapter, {MODULE: (16, 24)})  # transposed, as in GPT-2
    check_shapes(adapter, {"another": (1, 1)})
    with pytest.raises(InvalidField, match=r"16 inputs and 24 outputs, the weight is \[16, 16\]"):
        check_shapes(adapter, {MODULE: (16, 16)})
