"""vLLM with LoRA adapters, on a model with a sliding window, against the transformers backbone with the same ones."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from support import parity
from support.adapters import train_adapter, write_adapter
from support.parity import EAGER, EVERY_MAPPED_TAP, TOLERANCE, WIDTH, ids, one_a_tap, random_group, read, worst_error

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm does it", exc_type=ImportError)

from inward.backbones.transformers.backbone import TransformersBackbone
from inward.backbones.vllm.backbone import VllmBackbone
from inward.errors import InvalidField
from inward.types import BASE, Group, Position, Readout, SamplingSpec, Tap

RNG = np.random.default_rng(0)


def mapped(layer: int, position: Position, *, final_norm: bool = False) -> Tap:
    """In numbers that are kept for cached tokens; whole states are not, so they don't use the prefix cache."""
    return Tap(layer, position, RNG.normal(size=(WIDTH, 8)).astype(np.float32), final_norm=final_norm)


READOUTS = [
    Readout((mapped(2, "last"), mapped(4, "mean"))),
    Readout((mapped(4, "last", final_norm=True), mapped(3, "eos"))),
]
WINDOW = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    model = parity.save(transformers.MistralConfig, folder / "model", sliding_window=WINDOW)
    train_adapter(model, folder / "v1", r=8)
    train_adapter(model, folder / "v2", seed=2, target_modules=["q_proj", "down_proj"], use_rslora=True)
    return folder


@pytest.fixture(scope="module")
def reference(folder: Path) -> TransformersBackbone:
    return TransformersBackbone(folder / "model", name="tiny", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def opened(folder: Path) -> Iterator[VllmBackbone]:
    backbone = VllmBackbone(folder / "model", name="tiny", dtype="float32", options=EAGER, adapters=True)
    yield backbone
    asyncio.run(backbone.close())


@pytest.fixture
def backbone(opened: VllmBackbone) -> VllmBackbone:
    asyncio.run(opened.load_adapter(BASE, None))
    return opened


def carry(folder: Path, version: str, *backbones: Any) -> None:
    for backbone in backbones:
        asyncio.run(backbone.load_adapter(version, None if version == BASE else folder / version))


def test_a_model_with_a_sliding_window_equals_transformers_also_from_the_prefix_cache(
    folder: Path, backbone: VllmBackbone, reference: TransformersBackbone
) -> None:
    carry(folder, BASE, reference)
    rng = np.random.default_rng(1)
    groups = [random_group(rng, n) for n in (1, 2, 5)] + [
        Group(ids(rng, 5 * WINDOW), (ids(rng, 3 * WINDOW), ids(rng, 2)))
    ]
    readouts = one_a_tap(EVERY_MAPPED_TAP)
    truth = read(reference, groups, readouts, tokens=True)
    for _ in range(2):
        got = read(backbone, groups, readouts, tokens=True)
        assert worst_error(got, truth) <= TOLERANCE
    assert got[-1].cached_tokens > 5 * WINDOW


def test_states_and_samples_of_each_version_are_its_own_whatever_the_prefix_cache_holds(
    folder: Path, backbone: VllmBackbone, reference: TransformersBackbone
) -> None:
    rng = np.random.default_rng(2)
    group = Group(ids(rng, 96), (ids(rng, 40),))
    drawing = Group(group.prompt_ids, sampling=SamplingSpec(2, max_tokens=12, temperature=0))
    drawn = {}
    for version in (BASE, "v1", "v2", BASE, "v1"):
        carry(folder, version, backbone, reference)
        (fresh,), (cached,) = (read(backbone, [group], READOUTS, tokens=True) for _ in range(2))
        assert {fresh.policy_version, cached.policy_version, backbone.policy_version} == {version}
        assert worst_error([fresh, cached], read(reference, [group, group], READOUTS, tokens=True)) <= TOLERANCE
        assert fresh.cached_tokens == 0
        assert cached.cached_tokens >= 96
        samples, reading = asyncio.run(backbone.sample_and_read(drawing, READOUTS))
        assert samples == asyncio.run(reference.sample(drawing))
        finished = Group(drawing.prompt_ids, tuple(sample.ids for sample in samples))
        assert worst_error([reading], read(reference, [finished], READOUTS)) <= TOLERANCE
        assert drawn.setdefault(version, samples) == samples
    assert len({samples[0].ids for samples in drawn.values()}) == 3


async def test_calls_in_flight_finish_with_the_version_with_which_they_began(
    folder: Path, backbone: VllmBackbone, reference: TransformersBackbone
) -> None:
    rng = np.random.default_rng(3)
    drawing = [Group(ids(rng, 30), sampling=SamplingSpec(3, max_tokens=40, seed=i)) for i in range(6)]
    calls = []
    for i, group in enumerate(drawing):
        version = (BASE, "v1", "v2")[i % 3]
        await backbone.load_adapter(version, None if version == BASE else folder / version)
        calls.append((version, asyncio.create_task(backbone.sample_and_read(group, READOUTS))))
        await asyncio.sleep(0)  # it has begun
    for group, (version, call) in zip(drawing, calls, strict=True):
        samples, reading = await call
        assert reading.policy_version == version
        await reference.load_adapter(version, None if version == BASE else folder / version)
        finished = Group(group.prompt_ids, tuple(sample.ids for sample in samples))
        assert worst_error([reading], await reference.read([finished], READOUTS)) <= TOLERANCE


def test_an_adapter_that_cannot_be_carried_is_refused_and_the_former_one_stays(
    folder: Path, backbone: VllmBackbone, tmp_path: Path
) -> None:
    carry(folder, "v1", backbone)
    group = Group((5, 6, 7), ((8, 9),))
    before = read(backbone, [group], READOUTS)

    def module(name: str, rank: int = 2, inputs: int = WIDTH) -> dict[str, tuple[int, int]]:
        return {
            f"base_model.model.{name}.lora_A.weight": (rank, inputs),
            f"base_model.model.{name}.lora_B.weight": (WIDTH, rank),
        }

    q_proj = "model.layers.0.self_attn.q_proj"
    refused = {
        "of another size": (module(q_proj, inputs=WIDTH // 2), "the weight is"),
        "unknown": (module("model.layers.0.self_attn.sideways"), "refuses the adapter"),
        "too many": (module(q_proj, rank=128), "rank"),
    }
    for name, (tensors, why) in refused.items():
        rank = next(iter(tensors.values()))[0]
        target = next(iter(tensors)).split(".")[-3]
        adapter = write_adapter(tmp_path / name, tensors=tensors, r=rank, target_modules=[target])
        with pytest.raises(InvalidField, match=why):
            asyncio.run(backbone.load_adapter(name, adapter))
    assert backbone.policy_version == "v1"
    assert worst_error(read(backbone, [group], READOUTS), before) <= 1e-5
