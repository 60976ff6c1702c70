"""Reading inside a compiled model, which is how vLLM comes: against the transformers backbone in float32, with chunked
prefill, prefix-cache hits, an evicting cache and heads that change meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import transformers

from support import parity
from support.parity import (
    EVERY_MAPPED_TAP,
    EVERY_TAP,
    LAYERS,
    OPTIONS,
    TOLERANCE,
    WIDTH,
    ids,
    one_a_tap,
    random_group,
    read,
    together,
    worst_error,
)

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm does it", exc_type=ImportError)

from inward.backbones.transformers.backbone import TransformersBackbone
from inward.backbones.vllm.backbone import VllmBackbone
from inward.errors import SetupError
from inward.types import Group, Readout, SamplingSpec, Tap


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parity.save(transformers.LlamaConfig, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reference(folder: Path) -> TransformersBackbone:
    return TransformersBackbone(folder, name="tiny", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Iterator[VllmBackbone]:
    opened = VllmBackbone(folder, name="tiny", dtype="float32", options=OPTIONS)
    yield opened
    asyncio.run(opened.close())


def test_the_model_is_compiled_and_read_at_every_layer_and_position(
    backbone: VllmBackbone, reference: TransformersBackbone
) -> None:
    assert backbone._engine.compiled
    rng = np.random.default_rng(1)
    groups = [random_group(rng, int(rng.integers(1, 4)), longest=100) for _ in range(40)]
    readouts = one_a_tap(EVERY_MAPPED_TAP)
    truth = read(reference, groups, readouts, tokens=True)
    fresh = read(backbone, groups[:20], readouts, tokens=True)
    assert worst_error(fresh, truth[:20]) <= TOLERANCE
    for _ in range(2):  # few enough that the cache still holds them the second time
        cached = read(backbone, groups[:4], readouts, tokens=True)
        assert worst_error(cached, truth[:4]) <= TOLERANCE
    assert sum(r.cached_tokens for r in cached) > sum(r.cached_tokens for r in fresh[:4])
    assert worst_error(read(backbone, groups, readouts, tokens=True), truth) <= TOLERANCE  # more than the cache holds


def test_whole_states_are_read_too(backbone: VllmBackbone, reference: TransformersBackbone) -> None:
    rng = np.random.default_rng(2)
    groups = [random_group(rng, n) for n in (1, 2, 5)]
    readouts = one_a_tap(EVERY_TAP)
    assert worst_error(read(backbone, groups, readouts), read(reference, groups, readouts)) <= TOLERANCE


def test_mixed_load_while_heads_come_and_go(backbone: VllmBackbone, reference: TransformersBackbone) -> None:
    rng = np.random.default_rng(3)

    def head() -> Readout:
        layer = int(rng.integers(0, LAYERS + 1))
        taps = (Tap(layer, "eos", rng.normal(size=(WIDTH, 4)).astype(np.float32)),)
        return Readout((*taps, Tap(LAYERS, "mean", rng.normal(size=(WIDTH, 2)).astype(np.float32), final_norm=True)))

    heads = [head() for _ in range(30)]
    given = [random_group(rng, 2) for _ in range(30)]
    drawn = [Group(ids(rng, 30), sampling=SamplingSpec(4, max_tokens=24, seed=i)) for i in range(10)]
    *scores, drawings = together(
        *(lambda g=g, h=h: backbone.read([g], [h]) for g, h in zip(given, heads, strict=True)),  # type: ignore[misc]
        lambda: asyncio.gather(*(backbone.sample_and_read(g, heads[:3], tokens=True) for g in drawn)),
    )
    for group, own, result in zip(given, heads, scores, strict=True):
        assert worst_error(result, read(reference, [group], [own])) <= TOLERANCE
    for group, (samples, reading) in zip(drawn, drawings, strict=True):
        finished = Group(group.prompt_ids, tuple(sample.ids for sample in samples))
        assert worst_error([reading], read(reference, [finished], heads[:3], tokens=True)) <= TOLERANCE


def test_a_compiled_model_that_cannot_be_read_is_run_eagerly_and_the_log_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    verify = VllmBackbone._verify

    async def refuses_compiled(backbone: VllmBackbone) -> None:
        if backbone._engine.compiled:
            raise SetupError("nothing was read")
        await verify(backbone)

    monkeypatch.setattr(VllmBackbone, "_verify", refuses_compiled)
    opened = VllmBackbone(folder, name="tiny", dtype="float32", options=OPTIONS)
    try:
        assert not opened._engine.compiled
        assert "tiny can't be read as vLLM compiles it (nothing was read)" in caplog.text
    finally:
        asyncio.run(opened.close())
