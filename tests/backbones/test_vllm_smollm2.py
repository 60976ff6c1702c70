"""vLLM against the transformers backbone on the real model and on real texts, in float32."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from support.real_data import rows
from support.real_model import smollm2

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm does it", exc_type=ImportError)

from inward.backbones.tokenizer import load_tokenizer
from inward.backbones.transformers.backbone import TransformersBackbone
from inward.backbones.vllm.backbone import VllmBackbone
from inward.prompts import Prompts
from inward.types import Floats, Group, Readout, Tap

LAYERS, WIDTH = (1, 10, 18, 30), 576
PAIRS = 8
OPTIONS = {"kv_cache_memory_bytes": 256 * 2**20, "max_num_seqs": 16, "max_model_len": 2048}


@pytest.fixture(scope="module")
def folder() -> Path:
    return smollm2()


@pytest.fixture(scope="module")
def groups(folder: Path) -> list[Group]:
    prompts = Prompts(load_tokenizer(folder), max_tokens=1024)
    pairs = rows("hh_harmless_pairs.jsonl", PAIRS)
    return [prompts.group(p["prompt"], [p["chosen"], p["rejected"]], truncate=True).group for p in pairs]


def test_real_pairs_read_alike_in_both_backbones(folder: Path, groups: list[Group]) -> None:
    readout = Readout(tuple(Tap(layer, position) for layer in LAYERS for position in ("last", "eos", "mean")))

    async def read(backbone: TransformersBackbone | VllmBackbone) -> list[Floats]:
        try:
            return [of_group.readings[0].values_NK for of_group in await backbone.read(groups, [readout])]
        finally:
            await backbone.close()

    ours = asyncio.run(read(TransformersBackbone(folder, name="smollm2", dtype="float32", device="cpu")))
    theirs = asyncio.run(read(VllmBackbone(folder, name="smollm2", dtype="float32", options=OPTIONS)))
    for one, other in zip(ours, theirs, strict=True):
        for a, b in zip(*(np.split(values, values.shape[1] // WIDTH, axis=1) for values in (one, other)), strict=True):
            assert np.linalg.norm(a - b) < 1e-4 * np.linalg.norm(a)
