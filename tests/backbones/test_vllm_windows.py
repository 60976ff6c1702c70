"""vLLM on a model in which some layers have a sliding window and others have not, against the transformers backbone."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import transformers

from support import parity
from support.parity import EAGER, EVERY_MAPPED_TAP, TOLERANCE, ids, one_a_tap, random_group, read, worst_error

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm does it", exc_type=ImportError)

from inward.backbones.transformers.backbone import TransformersBackbone
from inward.backbones.vllm.backbone import VllmBackbone
from inward.backbones.vllm.worker import ReadingWorker
from inward.types import Group, SamplingSpec

WINDOW = 24


def test_it_equals_transformers_also_from_the_prefix_cache_and_while_drawing(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    more = {"sliding_window": WINDOW, "head_dim": 32, "query_pre_attn_scalar": 32, "layer_types": kinds}
    folder = parity.save(transformers.Gemma3TextConfig, tmp_path, **more)
    reference = TransformersBackbone(folder, name="tiny", dtype="float32", device="cpu")
    backbone = VllmBackbone(folder, name="tiny", dtype="float32", options=EAGER)
    rng = np.random.default_rng(1)
    groups = [random_group(rng, n) for n in (1, 2, 5)] + [
        Group(ids(rng, 5 * WINDOW), (ids(rng, 3 * WINDOW), ids(rng, 2)))
    ]
    readouts = one_a_tap(EVERY_MAPPED_TAP)
    truth = read(reference, groups, readouts, tokens=True)
    for _ in range(2):
        assert worst_error(read(backbone, groups, readouts, tokens=True), truth) <= TOLERANCE
    drawing = Group(ids(rng, 2 * WINDOW), sampling=SamplingSpec(4, max_tokens=2 * WINDOW, seed=1))
    samples, reading = asyncio.run(backbone.sample_and_read(drawing, readouts))
    finished = Group(drawing.prompt_ids, tuple(sample.ids for sample in samples))
    assert worst_error([reading], read(reference, [finished], readouts)) <= TOLERANCE
    asyncio.run(backbone.close())


def test_a_model_that_keeps_its_tokens_in_several_kinds_of_cache_is_refused() -> None:
    groups = [SimpleNamespace(kv_cache_spec=object(), layer_names=["layer"])]
    worker = ReadingWorker.__new__(ReadingWorker)
    worker._reader = SimpleNamespace()
    worker.model_runner = SimpleNamespace(kv_cache_config=SimpleNamespace(kv_cache_groups=groups))
    for _ in range(2):
        with pytest.raises(NotImplementedError, match="one kind of cache"):
            worker.inward_install((), ())
        groups += groups
