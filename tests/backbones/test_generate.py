"""Drawing beside reading: whose turn it is, who shares a cache with whom, and that nothing is drawn for nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch

from inward.backbones.transformers import generate
from inward.backbones.transformers.backbone import TransformersBackbone
from inward.errors import EngineDead, InvalidField
from inward.types import Group, Readout, Sample, SamplingSpec, Tap
from support.families import save
from support.waiting import PATIENCE, until

READOUT = Readout((Tap(3, "last"),))
GIVEN = [Group((3, 4, 5), ((6, 7), (8,)))]
LONG = SamplingSpec(4, max_tokens=100_000)
MORE = {"lfm2": {"layer_types": ["conv", "full_attention", "conv"]}}

Load = Callable[[str], TransformersBackbone]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Load]:
    @cache
    def loaded(kind: str) -> TransformersBackbone:
        folder = save(kind, tmp_path_factory.mktemp(kind), max_position_embeddings=4096, **MORE.get(kind, {}))
        backbone = TransformersBackbone(folder, name=kind, dtype="float32", device="cpu")
        backbone._end_ids = backbone._scheduler._sampler._end_ids = ()  # drawings end by their length alone
        return backbone

    yield loaded


class Steps:
    """Rows and tokens of each forward pass of the model with its head."""

    def __init__(self, backbone: TransformersBackbone) -> None:
        self.shapes: list[tuple[int, int]] = []
        whole = backbone._model.whole
        self._hook = whole.register_forward_pre_hook(
            lambda m, a, kwargs: self.shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *_: Any) -> None:
        self._hook.remove()


async def drawing(backbone: TransformersBackbone, *prompts: tuple[int, ...]) -> Any:
    with Steps(backbone) as steps:
        tasks = [asyncio.create_task(backbone.sample(Group(prompt, sampling=LONG))) for prompt in prompts]
        await until(lambda: len(steps.shapes) > len(prompts))
    return tasks


async def cancelled(backbone: TransformersBackbone, tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await until(lambda: not backbone._scheduler._sampler.busy)


@pytest.mark.parametrize("kind", ["llama", "mistral", "lfm2", "recurrent_gemma"])
def test_scores_come_back_while_a_long_drawing_runs(kind: str, load: Load) -> None:
    backbone = load(kind)

    async def scenario() -> None:
        tasks = await drawing(backbone, (3, 9, 27))
        for _ in range(3):
            (reading,) = await asyncio.wait_for(backbone.read(GIVEN, [READOUT]), PATIENCE)
            assert reading.readings[0].values_NK.shape[0] == 2
        assert not tasks[0].done()
        await cancelled(backbone, tasks)

    asyncio.run(scenario())


def test_drawing_and_reading_take_turns_and_neither_starves(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load("llama")
    scheduler, turns = backbone._scheduler, []

    def noted(name: str, work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            turns.append((name, bool(scheduler._reads), scheduler._sampler.busy))
            work()

        return run

    monkeypatch.setattr(scheduler, "_read_turn", noted("read", scheduler._read_turn))
    monkeypatch.setattr(scheduler._sampler, "step", noted("step", scheduler._sampler.step))

    async def scenario() -> None:
        tasks = await drawing(backbone, (3, 9, 27))
        for _ in range(10):
            await asyncio.gather(*(backbone.read(GIVEN, [READOUT]) for _ in range(4)))
        assert not tasks[0].done()
        await cancelled(backbone, tasks)

    asyncio.run(scenario())
    both = [name for name, reads, draws in turns if reads and draws]
    assert both.count("read") > 10
    assert abs(both.count("read") - both.count("step")) <= len(both) // 4


@pytest.mark.parametrize("kind", ["llama", "mistral", "lfm2", "recurrent_gemma"])
def test_a_cancelled_drawing_stops_within_a_few_tokens(kind: str, load: Load) -> None:
    backbone = load(kind)

    async def scenario() -> tuple[int, int]:
        with Steps(backbone) as steps:
            tasks = await drawing(backbone, (3, 9, 27))
            await until(lambda: len(steps.shapes) > 12)
            for task in tasks:
                task.cancel()
            before = len(steps.shapes)
            await asyncio.gather(*tasks, return_exceptions=True)
            await until(lambda: not backbone._scheduler._sampler.busy)
            await backbone.read(GIVEN, [READOUT])
            return before, len(steps.shapes)

    before, after = asyncio.run(scenario())
    assert after - before <= 3


def test_a_cancelled_read_stops_between_its_runs(load: Load) -> None:
    backbone = load("llama")
    runs: list[int] = []
    hook = backbone._model.base.register_forward_pre_hook(lambda m, a, kw: runs.append(1), with_kwargs=True)
    groups = [Group(tuple(range(3, 60)), (tuple(range(3, 60)),)) for _ in range(2000)]

    async def scenario() -> None:
        task = asyncio.create_task(backbone.read(groups, [READOUT]))
        await until(lambda: len(runs) >= 2)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await backbone.read(GIVEN, [READOUT])

    asyncio.run(scenario())
    hook.remove()
    assert len(runs) < 2000 * 114 // 1024


def test_callers_share_one_forward_pass_and_draw_what_they_would_alone(load: Load) -> None:
    backbone = load("llama")
    prompts = [(3, 9, 27), (5, 6, 7, 8, 9, 10, 11), (40,)]
    specs = [
        SamplingSpec(3, max_tokens=20, seed=1),
        SamplingSpec(2, max_tokens=9, seed=2, top_k=5),
        SamplingSpec(2, 15, 0.0),
    ]
    groups = [Group(prompt, sampling=spec) for prompt, spec in zip(prompts, specs, strict=True)]
    alone = [asyncio.run(backbone.sample(group)) for group in groups]

    async def together() -> list[list[Sample]]:
        return await asyncio.gather(*(backbone.sample(group) for group in groups))

    with Steps(backbone) as steps:
        assert asyncio.run(together()) == alone
    assert max(rows for rows, _ in steps.shapes) == 7
    assert sum(1 for rows, tokens in steps.shapes if tokens == len(prompts[1])) == 1  # a prompt is computed once


def test_no_more_rows_than_there_is_room_for_and_later_ones_follow(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "ROWS", 5)
    backbone = load("mistral")
    spec = SamplingSpec(12, max_tokens=6, seed=3)
    with Steps(backbone) as steps:
        few = asyncio.run(backbone.sample(Group((3, 9, 27), sampling=spec)))
    assert max(rows for rows, _ in steps.shapes) == 5
    monkeypatch.setattr(generate, "ROWS", 64)
    assert asyncio.run(backbone.sample(Group((3, 9, 27), sampling=spec))) == few


def test_a_list_of_a_seed_holds_what_the_seeds_after_it_give_alone(load: Load) -> None:
    def draw(n: int, seed: int) -> list[Sample]:
        spec = SamplingSpec(n, max_tokens=8, seed=seed)
        return asyncio.run(load("llama").sample(Group((3, 9, 27), sampling=spec)))

    assert [sample.ids for sample in draw(3, 4)] == [draw(1, 4 + i)[0].ids for i in range(3)]


def test_a_sample_depends_on_its_seed_and_number_alone(load: Load) -> None:
    def draw(n: int) -> list[Sample]:
        return asyncio.run(load("llama").sample(Group((3, 9, 27), sampling=SamplingSpec(n, max_tokens=8, seed=4))))

    assert draw(2) == draw(6)[:2]
    assert len(set(draw(6))) == 6


def test_a_failure_is_told_to_its_own_caller_alone(load: Load) -> None:
    backbone = load("llama")
    good, bad = (Group(prompt, sampling=SamplingSpec(1, max_tokens=4)) for prompt in ((3, 9), (3, 10**6)))

    async def scenario() -> list[Any]:
        return await asyncio.gather(backbone.sample(bad), backbone.sample(good), return_exceptions=True)

    broken, fine = asyncio.run(scenario())
    assert isinstance(broken, IndexError)
    assert len(fine[0].ids) == 4
    assert backbone.healthy()


def test_an_empty_prompt_is_refused(load: Load) -> None:
    with pytest.raises(InvalidField, match="prompt is empty"):
        asyncio.run(load("llama").sample(Group((), sampling=SamplingSpec(1))))


def test_a_device_without_progress_is_not_healthy(load: Load) -> None:
    backbone = load("mistral")
    scheduler = backbone._scheduler
    scheduler._began = scheduler._clock()
    assert backbone.healthy()
    scheduler._clock = lambda: scheduler._began + 10_000  # type: ignore[operator]
    assert not backbone.healthy()
    with pytest.raises(EngineDead, match="no progress"):
        asyncio.run(backbone.sample(Group((3, 9), sampling=LONG)))
    scheduler._began = None


def test_caches_that_give_other_logits_are_not_used(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("llama")._model
    with torch.inference_mode():
        assert generate.choose_caching(model) == "shared"
        monkeypatch.setattr(generate.Cohort, "join", lambda cohort, other: cohort.rows.extend(other.rows))
        assert generate.choose_caching(model) == "repeated"
        monkeypatch.setattr(generate.Cohort, "spread", lambda cohort: None)
        assert generate.choose_caching(model) == "alone"
        monkeypatch.setattr(
            generate.Cohort, "feed", lambda cohort, model, tokens: torch.zeros(len(tokens), model.config.vocab_size)
        )
        assert generate.choose_caching(model) == "none"
