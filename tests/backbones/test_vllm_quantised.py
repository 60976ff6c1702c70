"""What vLLM's own options bring: a model on several devices, and quantised weights. Readouts come from them as from
any other."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import transformers
from safetensors.torch import load_file, save_file

from support import parity
from support.parity import EAGER, EVERY_MAPPED_TAP, one_a_tap, random_group, read, worst_error

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm does it", exc_type=ImportError)

from inward.backbones.transformers.backbone import TransformersBackbone
from inward.backbones.vllm.backbone import VllmBackbone
from inward.types import Group, SamplingSpec

INT8 = {
    "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": {
        "targets": ["Linear"], "output_activations": None,
        "weights": {
            "num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False,
            "observer": "minmax",
        },
        "input_activations": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
    }},
}  # fmt: skip


LARGEST = 63
"""Of a stored weight. Processors without VNNI add two 8-bit products in 16 bits, which saturate: with weights up to 127
a state is off by as much as 0.9 there (seen on AVX2), with these it can't be."""


def quantised(model: Path, folder: Path) -> Path:
    """The model with 8-bit linear layers in ``folder``; ``model`` itself gets the rounded weights."""
    shutil.copytree(model, folder)
    weights = load_file(model / "model.safetensors")
    stored, rounded = dict(weights), dict(weights)
    for name, weight in weights.items():
        if name.endswith("_proj.weight"):
            scale = weight.abs().amax(dim=1, keepdim=True) / LARGEST
            stored[name] = (weight / scale).round().char()
            stored[f"{name}_scale"] = scale
            rounded[name] = stored[name] * scale
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    save_file(rounded, model / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": INT8}))
    return folder


TWO_RANKS = pytest.mark.skipif(
    "INWARD_TWO_RANKS" not in os.environ, reason="two ranks want two idle cores: INWARD_TWO_RANKS=1 make test-vllm"
)


@pytest.mark.parametrize(("way", "tolerance"), [pytest.param("two ranks", 1e-4, marks=TWO_RANKS), ("eight bits", 0.1)])
def test_readouts_and_samples_are_those_of_the_model(tmp_path: Path, way: str, tolerance: float) -> None:
    model = folder = parity.save(transformers.LlamaConfig, tmp_path / "model", num_key_value_heads=2)
    options, dtype = EAGER, "float32"
    if way == "two ranks":
        options = {**EAGER, "tensor_parallel_size": 2}
    else:  # activations are rounded, too, so agreement is as good as 8 bits are (seen: 0.05, compiled 0.06)
        folder, dtype = quantised(model, tmp_path / "quantised"), "bfloat16"
    reference = TransformersBackbone(model, name="reference", dtype="float32", device="cpu")
    backbone = VllmBackbone(folder, name="options", dtype=dtype, options=options)
    try:
        groups, readouts = [random_group(np.random.default_rng(0), n) for n in (1, 2, 5)], one_a_tap(EVERY_MAPPED_TAP)
        truth = read(reference, groups, readouts, tokens=True)
        for _ in range(2):  # computed, and from the prefix cache
            assert worst_error(read(backbone, groups, readouts, tokens=True), truth) < tolerance
        prompt = groups[0].prompt_ids
        samples, reading = asyncio.run(
            backbone.sample_and_read(Group(prompt, sampling=SamplingSpec(4, max_tokens=20, seed=1)), readouts)
        )
        drawn = Group(prompt, tuple(sample.ids for sample in samples))
        assert worst_error([reading], read(reference, [drawn], readouts)) < tolerance
    finally:
        asyncio.run(backbone.close())
        asyncio.run(reference.close())
