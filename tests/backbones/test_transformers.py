"""Parity with the plain forward of transformers, one text at a time, float32."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inward.backbones.transformers import forward as forward_module
from inward.backbones.transformers.backbone import TransformersBackbone
from inward.errors import EngineDead, InvalidField, SetupError
from inward.types import Group, GroupReading, Position, Readout, SamplingSpec, Tap
from support.tiny_models import LAYERS, WIDTH, Plain, random_group, random_ids, save

PACKED = ("llama", "mistral", "qwen2", "gpt2", "gpt_neox")
CAUSAL = (*PACKED, "bloom")
POSITIONS: tuple[Position, ...] = ("prompt", "last", "eos", "mean")
EVERY_TAP = (
    *(Tap(layer, position) for layer in range(LAYERS + 1) for position in POSITIONS),
    Tap(LAYERS, "last", final_norm=True),
)
TOLERANCE = 1e-4

Folder = Callable[[str], Path]
Load = Callable[..., TransformersBackbone]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    @cache
    def saved(kind: str) -> Path:
        return save(kind, tmp_path_factory.mktemp(kind))

    return saved


@pytest.fixture(scope="module")
def load(folder: Folder) -> Load:
    @cache
    def loaded(kind: str, dtype: str = "float32", token_budget: int | None = None) -> TransformersBackbone:
        return TransformersBackbone(folder(kind), name=kind, dtype=dtype, device="cpu", token_budget=token_budget)

    return loaded


@pytest.fixture(scope="module")
def plain(folder: Folder) -> Callable[[str], Plain]:
    return cache(lambda kind: Plain(folder(kind)))


def read(
    backbone: TransformersBackbone, groups: Sequence[Group], taps: Sequence[Tap], *, tokens: bool = False
) -> list[GroupReading]:
    return asyncio.run(backbone.read(groups, [Readout((tap,)) for tap in taps], tokens=tokens))


def worst_error(
    reference: Plain, groups: Sequence[Group], taps: Sequence[Tap], results: Sequence[GroupReading]
) -> float:
    """The largest difference of any state from the reference's, relative to the largest number of that state."""
    worst = 0.0
    for group, result in zip(groups, results, strict=True):
        for tap, reading in zip(taps, result.readings, strict=True):
            for response, state in zip(group.responses_ids, reading.values_NK, strict=True):
                truth = reference.read(group.prompt_ids, response, tap.layer, tap.position, final_norm=tap.final_norm)
                worst = max(worst, float(np.abs(state - truth).max() / np.abs(truth).max()))
    return worst


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("sizes", [(1,), (2, 2), (1, 8, 2, 3)], ids=str)
def test_every_layer_and_position_equals_the_plain_forward(
    kind: str, sizes: tuple[int, ...], load: Load, plain: Any
) -> None:
    rng = np.random.default_rng(len(sizes))
    groups = [random_group(rng, n) for n in sizes]
    assert worst_error(plain(kind), groups, EVERY_TAP, read(load(kind), groups, EVERY_TAP)) <= TOLERANCE


@pytest.mark.parametrize("kind", PACKED)
def test_these_architectures_are_packed(kind: str, load: Load) -> None:
    assert load(kind).mode == "packed"


@pytest.mark.parametrize("kind", ["bloom", "mamba", "bert"])
def test_what_cannot_be_packed_is_read_padded_and_the_log_says_so(
    kind: str, folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "inward"):
        backbone = TransformersBackbone(folder(kind), name="this-model", dtype="float32", device="cpu")
    assert backbone.mode == "padded"
    assert "this-model cannot be packed" in caplog.text


def test_a_recurrent_model_equals_its_plain_forward(load: Load, plain: Any) -> None:
    rng = np.random.default_rng(0)
    groups = [random_group(rng, n) for n in (2, 3)]
    taps = [Tap(layer, "last") for layer in range(1, LAYERS)]
    results = read(load("mamba"), groups, taps)
    for group, result in zip(groups, results, strict=True):
        for tap, reading in zip(taps, result.readings, strict=True):
            for response, state in zip(group.responses_ids, reading.values_NK, strict=True):
                truth = plain("mamba").states(group.prompt_ids + response, tap.layer - 1)[
                    -1
                ]  # Mamba reports no embeddings
                np.testing.assert_allclose(state, truth, atol=TOLERANCE * np.abs(truth).max())


def test_an_encoder_is_read_at_every_layer_but_writes_nothing(load: Load, plain: Any) -> None:
    rng = np.random.default_rng(0)
    groups = [random_group(rng, n) for n in (2, 3)]
    taps = [tap for tap in EVERY_TAP if tap.position != "eos"]
    assert worst_error(plain("bert"), groups, taps, read(load("bert"), groups, taps)) <= TOLERANCE
    with pytest.raises(InvalidField, match="both directions"):
        read(load("bert"), groups, [Tap(1, "eos")])
    with pytest.raises(InvalidField, match="no language-model head"):
        asyncio.run(load("bert").sample(Group((3,), sampling=SamplingSpec(1))))


GROUPS = st.lists(
    st.builds(
        lambda prompt, responses: Group(tuple(prompt), tuple(map(tuple, responses))),
        st.lists(st.integers(3, 63), min_size=1, max_size=14),
        st.lists(st.lists(st.integers(3, 63), max_size=9), min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("kind", ["mistral", "bloom"])
@given(groups=GROUPS, order=st.randoms(use_true_random=False), eos=st.booleans())
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_a_score_does_not_depend_on_neighbours_order_or_eos_readers(
    kind: str, groups: list[Group], order: Any, eos: bool, load: Load
) -> None:
    backbone = load(kind)
    taps = [Tap(2, "last"), Tap(LAYERS, "mean", final_norm=True), *([Tap(1, "eos")] if eos else [])]
    alone = [read(backbone, [group], taps[:2])[0] for group in groups]
    shuffled = list(range(len(groups)))
    order.shuffle(shuffled)
    together = read(backbone, [groups[i] for i in shuffled], taps)
    for i, result in zip(shuffled, together, strict=True):
        for one, other in zip(alone[i].readings, result.readings, strict=False):
            np.testing.assert_allclose(one.values_NK, other.values_NK, atol=TOLERANCE * np.abs(one.values_NK).max())


@pytest.mark.parametrize("kind", CAUSAL)
def test_bfloat16_stays_within_five_per_cent(kind: str, load: Load, plain: Any) -> None:
    rng = np.random.default_rng(0)
    groups = [random_group(rng, n) for n in (1, 2, 8)]
    backbone = load(kind, "bfloat16")
    assert backbone.info.dtype == "bfloat16"
    assert worst_error(plain(kind), groups, EVERY_TAP, read(backbone, groups, EVERY_TAP)) <= 0.05


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_tokens_gives_the_map_at_every_response_token(kind: str, load: Load, plain: Any) -> None:
    rng = np.random.default_rng(0)
    groups = [
        Group(random_ids(rng, 5), (random_ids(rng, 4), (), random_ids(rng, 7))),
        Group(random_ids(rng, 2), (random_ids(rng, 1),)),
    ]
    readout = Readout(tuple(Tap(2, position) for position in POSITIONS))
    for group, result in zip(groups, asyncio.run(load(kind).read(groups, [readout], tokens=True)), strict=True):
        (reading,) = result.readings
        assert reading.tokens_TK is not None
        for n, response in enumerate(group.responses_ids):
            assert reading.tokens_TK[n].shape == (len(response), 4 * WIDTH)
            by_position = np.split(reading.tokens_TK[n], 4, axis=1)
            truth = plain(kind).states(group.prompt_ids + response, 2)
            np.testing.assert_array_equal(by_position[0], np.tile(reading.values_NK[n, :WIDTH], (len(response), 1)))
            for own in by_position[1:]:
                np.testing.assert_allclose(own, truth[len(group.prompt_ids) :], atol=TOLERANCE * np.abs(truth).max())


def test_a_readout_is_its_taps_side_by_side_with_weights_and_biases_applied(load: Load, plain: Any) -> None:
    rng = np.random.default_rng(0)
    group = random_group(rng, 3)
    W1, W2 = rng.normal(size=(WIDTH, 2)).astype(np.float32), rng.normal(size=(WIDTH, 5)).astype(np.float32)
    b1 = np.array([1.0, -1.0], dtype=np.float32)
    first = Readout((Tap(1, "last", W1, b1), Tap(3, "mean", W2)))
    second = Readout((Tap(1, "last"), Tap(1, "last", W2)))
    (result,) = asyncio.run(load("llama").read([group], [first, second]))
    for n, response in enumerate(group.responses_ids):
        h1, h3 = (
            plain("llama").read(group.prompt_ids, response, layer, position)
            for layer, position in ((1, "last"), (3, "mean"))
        )
        np.testing.assert_allclose(
            result.readings[0].values_NK[n], np.concatenate([h1 @ W1 + b1, h3 @ W2]), rtol=1e-3, atol=1e-4
        )
        np.testing.assert_allclose(result.readings[1].values_NK[n], np.concatenate([h1, h1 @ W2]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_a_state_that_does_not_exist_reads_as_nan_and_harms_no_neighbour(kind: str, load: Load, plain: Any) -> None:
    groups = [Group((), ((5, 6),)), Group((7, 8), ((9,),))]
    taps = [Tap(1, "prompt"), Tap(1, "last")]
    nothing, something = read(load(kind), groups, taps)
    assert np.isnan(nothing.readings[0].values_NK).all()
    assert np.isfinite(nothing.readings[1].values_NK).all()
    assert worst_error(plain(kind), groups[1:], taps, [something]) <= TOLERANCE


def test_costs_count_a_prompt_once_and_say_what_was_saved(load: Load) -> None:
    group = Group((3, 4, 5), ((6,), (7, 8)))
    (result,) = read(load("llama"), [group], [Tap(1, "last")])
    assert (result.computed_tokens, result.cached_tokens) == (6, 3)
    (result,) = read(load("llama"), [group], [Tap(1, "eos")])
    assert (result.computed_tokens, result.cached_tokens) == (8, 3)
    (result,) = read(load("bloom"), [group], [Tap(1, "last")])
    assert (result.computed_tokens, result.cached_tokens) == (9, 0)


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_no_forward_exceeds_the_budget_and_splitting_changes_nothing(kind: str, load: Load) -> None:
    rng = np.random.default_rng(0)
    groups = [random_group(rng, n) for n in (1, 2, 3, 1, 2, 1)]
    small, large = load(kind, token_budget=60), load(kind)
    sizes: list[int] = []
    model = small._model.base
    hook = model.register_forward_pre_hook(
        lambda m, a, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    split = read(small, groups, [Tap(2, "mean")])
    hook.remove()
    assert len(sizes) > 1
    assert max(sizes) <= 60
    for one, other in zip(split, read(large, groups, [Tap(2, "mean")]), strict=True):
        np.testing.assert_allclose(one.readings[0].values_NK, other.readings[0].values_NK, atol=1e-5)


def test_blocks_above_the_deepest_readout_do_not_run(load: Load) -> None:
    backbone, ran = load("llama"), []
    hooks = [
        block.register_forward_pre_hook(lambda m, a, k=k: ran.append(k))
        for k, block in enumerate(backbone._model.blocks, start=1)
    ]
    read(backbone, [Group((3, 4), ((5,),))], [Tap(2, "last"), Tap(1, "mean")])
    read(backbone, [Group((3, 4), ((5,),))], [Tap(0, "last")])
    for hook in hooks:
        hook.remove()
    assert ran in ([1, 2], [1, 2, 1])  # at layer 0 it stops at the door of block 1


def test_only_wanted_numbers_are_kept_and_no_hook_stays(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load("llama")
    seen: list[Any] = []
    original = forward_module.capture

    def spy(base: Any, blocks: Any, products: Any, spans: Any, run: Any) -> Any:
        def counted() -> None:
            seen.append([len(block._forward_hooks) for block in blocks])
            run()

        outputs = original(base, blocks, products, spans, counted)
        seen.append([output.shape for output in outputs])
        return outputs

    monkeypatch.setattr(forward_module, "capture", spy)
    groups = [Group(tuple(range(3, 30)), ((5, 6, 7), (8,)))]
    weight = np.ones((WIDTH, 1), dtype=np.float32)
    asyncio.run(backbone.read(groups, [Readout((Tap(2, "mean", weight),))]))
    assert seen == [[0, 1, 0], [(2, 1)]]
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in backbone._model.blocks)


def test_hooks_are_gone_and_the_next_call_works_after_an_exception(load: Load) -> None:
    backbone = load("llama")
    with pytest.raises(IndexError):
        read(backbone, [Group((10**6,), ((5,),))], [Tap(2, "last"), Tap(0, "last")])
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in backbone._model.blocks)
    assert backbone.healthy()
    assert len(read(backbone, [Group((3,), ((5,),))], [Tap(2, "last")])) == 1


@pytest.mark.parametrize(
    "tap", [Tap(LAYERS + 1, "last"), Tap(1, "last", final_norm=True), Tap(1, "last", np.ones((5, 1), np.float32))]
)
def test_a_tap_that_does_not_fit_the_backbone_is_refused(tap: Tap, load: Load) -> None:
    with pytest.raises(InvalidField):
        read(load("llama"), [Group((3,), ((5,),))], [tap])


@pytest.mark.parametrize("kind", [*CAUSAL, "mamba"])
def test_greedy_samples_continue_the_prompt_as_plain_generation_does(kind: str, load: Load, folder: Folder) -> None:
    from transformers import AutoModelForCausalLM

    prompt = (3, 9, 27, 17)
    reference = AutoModelForCausalLM.from_pretrained(folder(kind), dtype=torch.float32)
    whole = reference.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=6, eos_token_id=2, pad_token_id=2
    )
    expected = [i for i in whole[0, len(prompt) :].tolist() if i != 2]
    samples = asyncio.run(load(kind).sample(Group(prompt, sampling=SamplingSpec(2, max_tokens=6, temperature=0))))
    assert [list(sample.ids) for sample in samples] == [expected] * 2


def test_a_seed_makes_samples_reproducible_and_leaves_others_free(load: Load) -> None:
    def draw(seed: int | None) -> list[Any]:
        return asyncio.run(load("llama").sample(Group((3, 9, 27), sampling=SamplingSpec(4, max_tokens=8, seed=seed))))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(None) != draw(None)
    assert len({sample.ids for sample in draw(1)}) > 1


def test_samples_end_at_the_limit_at_an_eos_or_at_a_stop_string(load: Load) -> None:
    samples = asyncio.run(
        load("llama").sample(Group((3, 9), sampling=SamplingSpec(64, max_tokens=12, temperature=3.0, seed=0)))
    )
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}
    for sample in samples:
        assert 2 not in sample.ids
        assert (len(sample.ids) == 12) == (sample.finish_reason == "length")
        assert sample.text.split() == [f"w{i}" for i in sample.ids if i != 1]  # a BOS is an id but no text
    third = next(i for i, s in enumerate(samples) if len(s.ids) > 2 and s.ids[2] > 9 and s.ids[2] not in s.ids[:2])
    word = f"w{samples[third].ids[2]}"
    stopped = asyncio.run(
        load("llama").sample(
            Group((3, 9), sampling=SamplingSpec(64, max_tokens=12, temperature=3.0, seed=0, stop=(f" {word}",)))
        )
    )
    assert stopped[third].finish_reason == "stop"
    assert stopped[third].ids == samples[third].ids[:2]
    assert all(f" {word}" not in sample.text for sample in stopped)


def test_reading_after_sampling_is_unchanged(load: Load) -> None:
    groups = [Group((3, 4, 5), ((6, 7), (8,)))]
    before = read(load("mistral"), groups, EVERY_TAP)
    asyncio.run(load("mistral").sample(Group((3, 4, 5, 6, 7, 8), sampling=SamplingSpec(3, max_tokens=10))))
    after = read(load("mistral"), groups, EVERY_TAP)
    for one, other in zip(before[0].readings, after[0].readings, strict=True):
        np.testing.assert_array_equal(one.values_NK, other.values_NK)


def test_concurrent_callers_get_their_own_answers(load: Load) -> None:
    rng = np.random.default_rng(0)
    groups = [random_group(rng, 2) for _ in range(8)]
    readout = Readout((Tap(3, "last"),))

    async def all_at_once() -> list[list[GroupReading]]:
        return await asyncio.gather(*(load("llama").read([group], [readout]) for group in groups))

    for group, (result,) in zip(groups, asyncio.run(all_at_once()), strict=True):
        (alone,) = asyncio.run(load("llama").read([group], [readout]))
        np.testing.assert_allclose(result.readings[0].values_NK, alone.readings[0].values_NK, atol=1e-5)


def test_close_lets_calls_in_flight_finish_and_refuses_later_ones(folder: Folder) -> None:
    backbone = TransformersBackbone(folder("llama"), name="m", dtype="float32", device="cpu")
    group, readout = Group((3, 4), ((5,),)), Readout((Tap(3, "last"),))

    async def scenario() -> GroupReading:
        call = asyncio.create_task(backbone.read([group], [readout]))
        await asyncio.sleep(0)
        await backbone.close()
        with pytest.raises(EngineDead):
            await backbone.read([group], [readout])
        return (await call)[0]

    assert asyncio.run(scenario()).readings[0].values_NK.shape == (1, WIDTH)
    assert not backbone.healthy()


def test_a_failed_device_makes_the_backbone_unhealthy(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = TransformersBackbone(folder("llama"), name="m", dtype="float32", device="cpu")

    def fail(*args: Any) -> Any:
        raise torch.AcceleratorError("device-side assert triggered")
        yield

    monkeypatch.setattr(backbone, "_read", fail)
    for _ in range(2):
        with pytest.raises(EngineDead):
            read(backbone, [Group((3,), ((5,),))], [Tap(1, "last")])
    assert not backbone.healthy()


def test_a_folder_without_a_usable_model_is_refused_with_its_name(tmp_path: Path, folder: Folder) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder("llama") / name).read_bytes())
    with pytest.raises(SetupError, match=tmp_path.name):
        TransformersBackbone(tmp_path, name="m", device="cpu")
