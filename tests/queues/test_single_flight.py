"""Identical items are computed once, and nobody notices."""

import asyncio
from dataclasses import replace

import pytest

from inward.queues.memory import MemoryQueue
from inward.queues.single_flight import SingleFlight
from inward.types import Failed, Group, HeadRef, Job, Piece, SamplingSpec, Scored, Scores, Usage
from support.queues import ids, job


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def both():
    return Both()


class Both:
    """A sharing producer in front of a queue in memory."""

    def __init__(self):
        self.clock, self.version = Clock(), 1
        self.queue = MemoryQueue(max_tokens=1000)
        self.shared = SingleFlight(
            self.queue, window=5.0, current=lambda s: s.heads[0].version == self.version, clock=self.clock
        )

    async def submit(self, *jobs):
        return [asyncio.ensure_future(wait) for wait in await self.shared.submit(jobs)]

    async def compute(self):
        """Scores what waits; the ids of the jobs."""
        await asyncio.sleep(0)
        batch = await self.queue.take(1000)
        await self.queue.settle([self.scored(j) for j in batch])
        await asyncio.sleep(0)
        return ids(batch)

    def scored(self, j):
        return Scored(
            j.id, (HeadRef("h", "legend", self.version),), (Scores((float(j.group.tokens),)),), "base", Usage()
        )


def score(outcome):
    return outcome.scores[0].scores_N[0]


async def test_items_that_wait_at_once_are_computed_once_and_each_gets_its_own_outcome(both):
    first = await both.submit(job("a", 7), job("b", 7), job("c", 8))
    second = await both.submit(job("d", 7))
    assert await both.compute() == ["a", "c"]
    outcomes = await asyncio.gather(*first, *second)
    assert [(o.job_id, score(o)) for o in outcomes] == [("a", 7.0), ("b", 7.0), ("c", 8.0), ("d", 7.0)]


async def test_who_asks_again_within_the_window_costs_nothing_and_after_it_is_computed(both):
    [wait] = await both.submit(job("a", 7))
    await both.compute()
    await wait
    [again] = await both.submit(job("b", 7))
    assert (await again).job_id == "b"
    both.clock.now += 6
    [later] = await both.submit(job("c", 7))
    assert await both.compute() == ["c"]
    await later


async def test_an_outcome_of_a_version_that_is_not_served_any_more_is_not_used(both):
    [wait] = await both.submit(job("a", 7))
    await both.compute()
    await wait
    both.version = 2
    [again] = await both.submit(job("b", 7))
    await both.compute()
    assert (await again).heads[0].version == 2


async def test_who_asks_after_a_switch_is_not_answered_by_what_began_before_it(both):
    [before] = await both.submit(job("a", 7))
    await asyncio.sleep(0)
    old = [both.scored(j) for j in await both.queue.take(1000)]
    both.version = 2
    [after] = await both.submit(job("b", 7))
    await both.queue.settle(old)
    assert (await before).heads[0].version == 1
    await asyncio.sleep(0)
    assert await both.compute() == ["b"]
    assert (await after).heads[0].version == 2


@pytest.mark.parametrize(
    "other", [{"heads": ("g",)}, {"pair": True}, {"details": frozenset({"tokens"})}, {"group": Group((1,) * 6, ((),))}]
)
async def test_items_that_differ_in_anything_are_not_shared(both, other):
    waits = await both.submit(job("a", 7), replace(job("b", 7), **other))
    assert await both.compute() == ["a", "b"]
    await asyncio.gather(*waits)


async def test_who_is_told_of_a_drawing_has_it_alone(both):
    drawing = Group((1, 2), sampling=SamplingSpec(1, seed=3, max_tokens=8))
    heard = []
    waits = await both.shared.submit([replace(job(name), group=drawing, told=True) for name in "ab"], heard.append)
    batch = await both.queue.take(1000)
    assert ids(batch) == ["a", "b"]
    for name in "ab":
        await both.queue.tell(Piece(name, 0, name))
    assert [piece.text for piece in heard] == ["a", "b"]
    await both.queue.settle([both.scored(one) for one in batch])
    assert [outcome.job_id for outcome in await asyncio.gather(*waits)] == ["a", "b"]


async def test_samples_are_shared_only_where_a_seed_makes_them_the_same(both):
    def drawn(name, seed):
        return Job(name, Group((1, 2), sampling=SamplingSpec(2, 3, seed=seed)), ("h",))

    waits = await both.submit(drawn("a", None), drawn("b", None), drawn("c", 1), drawn("d", 1))
    assert sorted(await both.compute()) == ["a", "b", "c"]
    await asyncio.gather(*waits)


async def test_who_leaves_takes_the_others_nothing_away(both):
    [first] = await both.submit(job("a", 7))
    [second] = await both.submit(job("b", 7))
    first.cancel()
    await both.shared.abandon(["a"])
    await both.compute()
    assert score(await second) == 7.0


async def test_what_nobody_waits_for_any_more_is_not_computed(both):
    waits = await both.submit(job("a", 7), job("b", 7))
    for wait in waits:
        wait.cancel()
    await both.shared.abandon(["a"])
    assert both.queue.tokens == 7
    await both.shared.abandon(["b"])
    assert both.queue.tokens == 0


async def test_a_failure_is_not_shared(both):
    [first] = await both.submit(job("a", 7))
    [second] = await both.submit(job("b", 7))
    await asyncio.sleep(0)
    await both.queue.settle([Failed(j.id, "deadline_exceeded", "too late") for j in await both.queue.take(100)])
    assert (await first).code == "deadline_exceeded"
    assert await both.compute() == ["b"]
    assert score(await second) == 7.0


async def test_nothing_is_left_behind(both):
    for i in range(50):
        waits = await both.submit(job(f"a{i}", 7), job(f"b{i}", 7), job(f"c{i}", 9))
        if i % 2:
            await both.compute()
            await asyncio.gather(*waits)
        await asyncio.gather(*waits, return_exceptions=True) if i % 2 else [w.cancel() for w in waits]
        await both.shared.abandon([f"{x}{i}" for x in "abc"])
        both.clock.now += 6
    assert (both.queue.tokens, both.shared._running, both.shared._of) == (0, {}, {})
