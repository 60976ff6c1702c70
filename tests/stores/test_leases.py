"""Identical items that reach different replicas cost one forward pass, and nobody waits for a replica that is gone."""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest

from inward.errors import Unavailable
from inward.queues.redis.consumer import RedisConsumer
from inward.queues.redis.producer import RedisProducer
from inward.queues.single_flight import SingleFlight
from inward.stores import leases as elsewhere
from inward.stores.connection import Connection
from inward.stores.leases import LeaseWatch, RedisLeases
from inward.types import Failed, HeadRef, SamplingSpec, Scored, Scores, Usage
from support.queues import KEYS, REPLICA, WORKER, job
from support.waiting import PATIENCE, until


class Town:
    """Replicas that share, and one worker, around a real Redis."""

    def __init__(self, server, stack):
        self.server, self._stack = server, stack
        self.version = 1

    async def connection(self):
        connection = Connection(self.server.url, timeout=PATIENCE)
        self._stack.push_async_callback(connection.close)
        return connection

    async def open(self, replicas):
        self.worker = RedisConsumer(await self.connection(), KEYS, **WORKER)
        await self.worker.open()
        self._stack.push_async_callback(self.worker.leave)
        return [await self.replica() for _ in range(replicas)]

    async def replica(self, window=PATIENCE):
        connection = await self.connection()
        producer = RedisProducer(connection, KEYS, max_tokens=10**6, **REPLICA)
        await producer.open()
        self._stack.push_async_callback(producer.leave)
        told = RedisLeases(connection, KEYS, window=window, running=PATIENCE, away=lambda: producer.away)
        watch = LeaseWatch(told, current=self.current)
        shared = SingleFlight(
            producer, window=0.0, current=self.current, watch=watch
        )  # nothing is kept in the replica itself
        shared.producer, shared.watch = producer, watch
        return shared

    def current(self, scored):
        return scored.heads[0].version == self.version

    async def compute(self, made=None):
        """Takes what waits and settles it; what was taken."""
        batch = await asyncio.wait_for(self.worker.take(10_000), PATIENCE)
        await self.worker.settle([(made or self.scored)(j) for j in batch])
        return batch

    def scored(self, j):
        return Scored(
            j.id, (HeadRef("h", "legend", self.version),), (Scores((float(j.group.tokens),)),), "base", Usage()
        )


@pytest.fixture(autouse=True)
def _grace(monkeypatch):
    """What is slow is not taken over."""
    monkeypatch.setattr(elsewhere, "GRACE", PATIENCE)


@pytest.fixture
async def town(redis_server):
    async with AsyncExitStack() as stack:
        yield Town(redis_server, stack)


async def submit(replica, *jobs):
    return [asyncio.ensure_future(wait) for wait in await replica.submit(jobs)]


async def answers(*waits):
    return await asyncio.wait_for(asyncio.gather(*waits), PATIENCE)


def score(outcome):
    return outcome.scores[0].scores_N[0]


async def test_a_client_that_asks_five_replicas_costs_one_forward_pass(town):
    replicas = await town.open(5)
    waits = [
        wait for i, replica in enumerate(replicas) for wait in await submit(replica, job(f"a{i}", 7), job(f"b{i}", 8))
    ]
    assert len(await town.compute()) == 2
    outcomes = await answers(*waits)
    assert [(o.job_id, score(o)) for o in outcomes] == [
        (f"{x}{i}", n) for i in range(5) for x, n in (("a", 7.0), ("b", 8.0))
    ]
    with town.server.client() as client:
        assert client.get(KEYS.key("done")) == b"15"
        assert client.hlen(KEYS.key("open")) == 0


async def test_who_asks_another_replica_later_is_answered_without_a_worker(town):
    first, second = await town.open(2)
    [wait] = await submit(first, job("a", 7))
    await town.compute()
    await answers(wait)
    await first.watch._telling
    [again] = await submit(second, job("b", 7))
    assert [(o.job_id, score(o)) for o in await answers(again)] == [("b", 7.0)]


async def test_an_outcome_of_a_version_that_is_not_served_any_more_is_not_used(town):
    first, second = await town.open(2)
    [wait] = await submit(first, job("a", 7))
    await town.compute()
    await answers(wait)
    await first.watch._telling
    town.version = 2
    [again] = await submit(second, job("b", 7))
    await town.compute()
    [outcome] = await answers(again)
    assert (outcome.job_id, outcome.heads[0].version) == ("b", 2)


async def test_when_the_one_that_computes_hangs_up_another_takes_its_turn(town):
    first, second, third = await town.open(3)
    await submit(first, job("a", 7))
    waits = [*await submit(second, job("b", 7)), *await submit(third, job("c", 7))]
    await first.abandon(["a"])
    assert len(await town.compute()) == 1
    assert [o.job_id for o in await answers(*waits)] == ["b", "c"]


async def test_a_replica_that_dies_holds_nobody_up(town, monkeypatch):
    monkeypatch.setattr(elsewhere, "GRACE", 0.1)
    dead, other = await town.open(2)
    await submit(dead, job("a", 7))
    [wait] = await submit(other, job("b", 7))
    for task in dead.producer._tasks:
        task.cancel()
    with town.server.client() as client:
        client.delete(KEYS.alive(dead.producer.replica))
    batch = await town.worker.take(10_000)
    assert await town.worker.wanted(batch) == []
    assert [j.id for j in await town.compute()] == ["b"]
    assert score((await answers(wait))[0]) == 7.0


async def test_an_outcome_that_never_came_is_computed_again(town, monkeypatch):
    monkeypatch.setattr(elsewhere, "GRACE", 0.1)
    deaf, other = await town.open(2)
    await submit(deaf, job("a", 7))
    [wait] = await submit(other, job("b", 7))
    for task in deaf.producer._tasks:
        task.cancel()
    assert [j.id for j in await town.compute()] == ["a"]
    assert [j.id for j in await town.compute()] == ["b"]
    await answers(wait)


async def test_a_failure_is_not_shared(town):
    first, second = await town.open(2)
    [failing] = await submit(first, job("a", 7))
    [wait] = await submit(second, job("b", 7))
    await town.compute(lambda j: Failed(j.id, "deadline_exceeded", "too late"))
    assert (await answers(failing))[0].code == "deadline_exceeded"
    await town.compute()
    assert score((await answers(wait))[0]) == 7.0


async def test_items_that_differ_and_samples_without_a_seed_are_computed_each(town):
    first, second = await town.open(2)
    drawn = replace(job("s", 7).group, sampling=SamplingSpec(2, 3))
    waits = await submit(first, job("a", 7), replace(job("s", 7), group=drawn))
    waits += await submit(second, job("b", 8), job("c", 7, pair=True), replace(job("t", 7), group=drawn))
    got = []
    while len(got) < 5:
        got += await town.compute()
    await answers(*waits)


async def test_redis_sees_a_hash_and_forgets_it(town):
    await town.open(0)
    replica = await town.replica(window=0.05)
    [wait] = await submit(replica, job("a", 7))
    with town.server.client() as client:
        [key] = client.keys(KEYS.shared("*"))
        assert 0 < client.pttl(key) <= 1000 * PATIENCE
        assert len(key.decode().rpartition(":")[2]) == 32
        await town.compute()
        await answers(wait)
        await until(lambda: not client.exists(key))


async def test_a_redis_that_is_away_is_said_at_once_and_who_watches_goes_on_watching(own_redis):
    async with AsyncExitStack() as stack:
        town = Town(own_redis(), stack)
        first, second = await town.open(2)
        [leader] = await submit(first, job("a", 7))
        [wait] = await submit(second, job("b", 7))
        second.producer.away = "gone"
        with pytest.raises(Unavailable, match="gone"):
            await second.submit([job("c", 9)])
        await asyncio.sleep(0.1)
        second.producer.away = None
        await town.compute()
        assert [score(o) for o in await answers(leader, wait)] == [7.0, 7.0]


async def test_nothing_is_left_behind(town):
    first, second = await town.open(2)
    for i in range(20):
        waits = await submit(first, job(f"a{i}", i + 1)) + await submit(second, job(f"b{i}", i + 1))
        if i % 2:
            await town.compute()
            await answers(*waits)
        else:
            for wait in waits:
                wait.cancel()
        await second.abandon([f"b{i}"])
        await first.abandon([f"a{i}"])
    await until(lambda: not (first.watch._looking or second.watch._looking))
    for replica in (first, second):
        assert (replica._running, replica._of, replica.producer.open_jobs, replica.watch._looking) == ({}, {}, 0, set())
    with town.server.client() as client:
        assert client.hlen(KEYS.key("open")) == 0
