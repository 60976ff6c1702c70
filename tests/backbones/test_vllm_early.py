"""Guards and early rejection on vLLM: what ends is aborted, and says what its tokens say when they are read again."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import transformers

from support import parity
from support.parity import EAGER, ids

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm does it", exc_type=ImportError)

from backbones.test_early import HEADS, PLAIN, assert_ends_told, assert_nothing_read, assert_told, follow
from inward.backbones.vllm.backbone import VllmBackbone
from inward.backbones.vllm.protocol import HELD
from inward.errors import Unavailable
from inward.heads.watch import watch
from inward.types import EarlyRejection, Group, GroupReading, Readout, Sample, SamplingSpec, StopRule, Tap
from support.waiting import until

LAST = Readout((Tap(3, "last", PLAIN.taps[0].weight_DK),))
PROMPT = ids(np.random.default_rng(5), 21)
SPEC = SamplingSpec(8, max_tokens=60, seed=3)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmBackbone]:
    folder = parity.save(transformers.LlamaConfig, tmp_path_factory.mktemp("early"))
    opened = VllmBackbone(folder, name="tiny", dtype="float32", options=EAGER)
    yield opened
    asyncio.run(opened.close())


def draw(backbone: VllmBackbone, spec: SamplingSpec, readout: Readout = PLAIN) -> tuple[list[Sample], GroupReading]:
    group = Group(PROMPT, sampling=spec)
    return asyncio.run(backbone.sample_and_read(group, [readout], watch=watch(spec, "plain", HEADS)))


def token_scores(backbone: VllmBackbone, samples: list[Sample], name: str) -> list[np.ndarray]:
    group = Group(PROMPT, tuple(sample.ids for sample in samples))
    (read,) = asyncio.run(backbone.read([group], [HEADS.resolve(name).readout], tokens=True))
    return [tokens[:, 0] for tokens in read.readings[0].tokens_TK]


@pytest.mark.parametrize("readout", [PLAIN, LAST], ids=["eos", "last"])
@pytest.mark.parametrize("stop", [(), ("\n\n\n",)], ids=["", "with stop strings"])
def test_what_is_rejected_is_what_the_whole_answers_say_and_the_others_are_untouched(
    backbone: VllmBackbone, readout: Readout, stop: tuple[str, ...]
) -> None:
    spec = replace(SPEC, stop=stop)
    whole, read = draw(backbone, spec, readout)
    samples, kept = draw(backbone, replace(spec, early_rejection=EarlyRejection(0.5, (6, 12))), readout)
    scores = token_scores(backbone, whole, "value")
    running = {i for i in range(8) if len(whole[i].ids) >= 6}
    for at in (6, 12):
        means = {i: float(scores[i][:at].mean()) for i in running if len(scores[i]) >= at}
        out = set(sorted(means, key=lambda i: means[i])[: len(means) // 2])
        for i in out:
            assert (samples[i].finish_reason, samples[i].ids) == ("rejected", whole[i].ids[:at])
            assert samples[i].stop_score == pytest.approx(means[i], abs=1e-3)
            assert samples[i].held_back < 16
        running -= out
    finished = [i for i, sample in enumerate(samples) if sample.finished]
    assert [samples[i] for i in finished] == [whole[i] for i in finished]
    values, all_values = kept.readings[0].values_NK, read.readings[0].values_NK
    assert np.abs(values[finished] - all_values[finished]).max() < 1e-3
    assert len(kept.readings) == 1
    assert 0 < len(finished) < 8


def test_a_guard_stops_and_gives_what_is_safe(backbone: VllmBackbone) -> None:
    whole, _ = draw(backbone, SPEC)
    scores = token_scores(backbone, whole, "plain")
    below = float(np.quantile(np.concatenate(scores), 0.05))
    samples, reading = draw(backbone, replace(SPEC, stop_when=StopRule("plain", below=below, pool="last")))
    ended = 0
    for sample, one, own in zip(samples, whole, scores, strict=True):
        unsafe = np.flatnonzero(own < below)
        if not len(unsafe):
            assert sample == one
            continue
        ended += 1
        assert (sample.finish_reason, sample.ids) == ("guard", one.ids[: unsafe[0]])
        assert sample.stop_score == pytest.approx(float(own[unsafe[0]]), abs=1e-3)
        assert len(sample.ids) + sample.held_back <= unsafe[0] + 24
    assert ended
    assert np.isnan(reading.readings[0].values_NK).sum() == ended


def test_where_a_guard_ends_all_answers_their_tokens_are_read_as_none(backbone: VllmBackbone) -> None:
    assert_nothing_read(backbone)


def test_tokens_are_told_while_they_are_drawn_and_a_guard_goes_first(backbone: VllmBackbone) -> None:
    assert_told(backbone, range(6))


@pytest.mark.parametrize("readout", ["table", "wide"])
@pytest.mark.parametrize("stop", [(), ("e",)], ids=["", "with stop strings"])
def test_tokens_are_told_however_an_answer_is_read(backbone: VllmBackbone, readout: str, stop: tuple[str, ...]) -> None:
    whole = Readout((Tap(3, "last"),))  # too wide for the table
    spec = SamplingSpec(1, max_tokens=40, seed=5, stop=stop)
    told: list[tuple[int, ...]] = []
    call = backbone.sample_and_read(
        Group(PROMPT, sampling=spec), [PLAIN if readout == "table" else whole], on_tokens=told.append
    )
    (sample,), _ = asyncio.run(call)
    assert sample == follow(backbone, spec)[0]
    assert len(told) > 1
    shown = [backbone.certain(ids) for ids in told]
    assert all(one.startswith(sample.text) or sample.text.startswith(one) for one in shown)


def test_each_end_is_told_when_it_comes(backbone: VllmBackbone) -> None:
    assert_ends_told(backbone, range(3))


def test_what_was_aborted_leaves_nothing_behind(backbone: VllmBackbone) -> None:
    async def held() -> list[int]:
        return await backbone._engine.call(lambda: backbone._engine.rpc(HELD))

    spec = replace(SPEC, early_rejection=EarlyRejection(0.25, (4,)))

    async def scenario() -> None:
        groups = [Group((*PROMPT, i), sampling=replace(spec, seed=i)) for i in range(6)]
        calls = (backbone.sample_and_read(g, [PLAIN], watch=watch(spec, "plain", HEADS)) for g in groups)
        for samples, _ in await asyncio.gather(*calls):
            assert any(sample.finish_reason == "rejected" for sample in samples)
        await backbone.read([Group((5, 6), ((7,),))], [PLAIN])  # brings what is to be forgotten
        left = await held()
        assert left[:2] == [0, 0]

    asyncio.run(scenario())


def test_asleep_it_answers_nobody_and_awake_it_reads_as_before(backbone: VllmBackbone) -> None:
    async def scenario() -> None:
        group, drawing = Group(PROMPT, (ids(np.random.default_rng(6), 30),)), Group(PROMPT, sampling=SPEC)
        before = await backbone.read([group], [PLAIN])
        begun = asyncio.create_task(backbone.sample_and_read(drawing, [PLAIN]))
        await until(lambda: bool(backbone._engine._tasks))
        await backbone.sleep()
        assert backbone.asleep and begun.done() and len((await begun)[0]) == SPEC.n
        with pytest.raises(Unavailable, match="sleeps"):
            await backbone.read([group], [PLAIN])
        await backbone.sleep()
        await backbone.wake()
        left = asyncio.create_task(backbone.sample_and_read(drawing, [PLAIN]))
        await until(lambda: bool(backbone._engine._tasks))
        hung_up = asyncio.create_task(backbone.sleep())
        await until(lambda: backbone.asleep)
        hung_up.cancel()  # what was begun goes on without whoever asked for it
        assert len((await left)[0]) == SPEC.n
        await backbone.sleep()
        assert backbone.asleep and hung_up.cancelled()
        await backbone.wake()
        after = await backbone.read([group], [PLAIN])
        assert not backbone.asleep
        assert after[0].cached_tokens == 0  # what was read went with the cache
        assert parity.worst_error(after, before) < 1e-5
        assert await backbone.sample_and_read(drawing, [PLAIN])

    asyncio.run(scenario())


def test_what_began_as_it_woke_is_waited_for_before_it_sleeps_again_and_nothing_else_begins(
    backbone: VllmBackbone,
) -> None:
    async def scenario() -> None:
        engine, drawing = backbone._engine, Group(PROMPT, sampling=SPEC)
        asyncio.run_coroutine_threadsafe(engine._switching.acquire(), engine._loop).result()  # as /wake holds it
        sleeping = asyncio.create_task(backbone.sleep())
        await until(lambda: backbone.asleep)
        engine.asleep = False  # as /wake leaves it
        begun = asyncio.create_task(backbone.sample_and_read(drawing, [PLAIN]))
        await until(lambda: bool(engine._tasks))
        engine._loop.call_soon_threadsafe(engine._switching.release)
        await until(lambda: backbone.asleep)
        assert not begun.done()
        await sleeping
        assert backbone.asleep and begun.done() and len((await begun)[0]) == SPEC.n
        await backbone.wake()

    asyncio.run(scenario())


def test_a_caller_that_leaves_ends_all_of_it(backbone: VllmBackbone) -> None:
    async def scenario() -> None:
        spec = replace(SPEC, max_tokens=500, early_rejection=EarlyRejection(0.5, (400,)))
        group = Group(PROMPT, sampling=spec)
        call = asyncio.create_task(backbone.sample_and_read(group, [PLAIN], watch=watch(spec, "plain", HEADS)))
        await until(lambda: bool(backbone._engine._tasks))
        await asyncio.sleep(0.2)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await until(lambda: not backbone._engine._tasks)
        await backbone.read([Group((5, 6), ((7,),))], [PLAIN])

    asyncio.run(scenario())
