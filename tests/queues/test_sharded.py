"""Several Redis servers as one queue: where jobs go, and what goes on when one of them is away."""

import asyncio
import logging
import signal
from collections import Counter
from contextlib import asynccontextmanager

import pytest

from inward import metrics
from inward.errors import EngineDead, Overloaded, ShardAway, Unavailable
from inward.queues.base import Closed
from inward.queues.redis.sharded import PATIENCE_S, ShardedConsumer, ShardedProducer, shards_of
from inward.queues.single_flight import SingleFlight
from inward.stores.connection import Connection
from inward.types import Failed, Group, HeadRef, Job, Piece, Scored, Scores, Usage
from support.queues import KEYS, done, endless, ids
from support.waiting import PATIENCE, until

PROMPTS = [(7, i) for i in range(400)]


def shard_of(prompt, shards):
    return shards_of(prompt, shards)[0]


def on(shard, shards, n=1):
    """The first prompts of a shard."""
    return [prompt for prompt in PROMPTS if shard_of(prompt, shards) == shard][:n]


def job(name, prompt, *, response=(1, 2), priority="interactive", **more):
    return Job(str(name), Group(prompt, (response,)), ("h",), priority=priority, **more)


def rejections():
    return {
        reason: metrics.REJECTIONS_TOTAL.labels(reason=reason)._value.get() for reason in ("queue_full", "no_worker")
    }


class Sharded:
    """One replica and one worker around several servers."""

    def __init__(self, urls, *, max_tokens, ttl):
        self.connections = [Connection(url, timeout=1.0) for url in urls]
        self.producer = ShardedProducer(self.connections, KEYS, max_tokens=max_tokens, beat=0.1, ttl=ttl)
        self.consumer = ShardedConsumer(self.connections, KEYS, idle=PATIENCE, ttl=PATIENCE)
        self.seen = Counter()
        self.tasks = []

    def run(self, *loops):
        self.tasks += [asyncio.create_task(loop()) for loop in loops]

    async def work(self):
        """Answers all that comes."""
        try:
            while True:
                jobs = await self.consumer.wanted(await self.consumer.take(1000))
                self.seen.update(one.id for one in jobs)
                ref = HeadRef("h", "legend", 1)
                await self.consumer.settle([Scored(one.id, (ref,), (Scores((1.0,)),), "base", Usage()) for one in jobs])
        except Closed:
            pass


@asynccontextmanager
async def sharded(servers, *, max_tokens=1_000_000, ttl=PATIENCE, work=True):
    it = Sharded([server.url for server in servers], max_tokens=max_tokens, ttl=ttl)
    it.run(it.consumer.keep, it.producer.keep_living, it.producer.keep_receiving)
    try:
        await until(lambda: all(shard.workers for shard in it.producer.shards))
        if work:
            it.run(it.work)
        yield it
    finally:
        for task in it.tasks:
            task.cancel()
        await asyncio.gather(*it.tasks, return_exceptions=True)
        await asyncio.gather(it.producer.leave(), it.consumer.leave())
        for connection in it.connections:
            await connection.close()


@pytest.mark.parametrize("shards", [1, 2, 3, 7])
def test_each_shard_has_about_as_many_prompts(shards):
    count = Counter(shard_of((i, 3), shards) for i in range(7000))
    assert set(count) == set(range(shards))
    assert all(0.85 < n * shards / 7000 < 1.15 for n in count.values())


@pytest.mark.parametrize("shards", [1, 2, 3, 7])
def test_a_shard_that_is_added_draws_its_part_and_moves_nothing_else(shards):
    before = [shard_of((i, 3), shards) for i in range(7000)]
    after = [shard_of((i, 3), shards + 1) for i in range(7000)]
    moved = [new for old, new in zip(before, after, strict=True) if old != new]
    assert set(moved) == {shards}
    assert 0.85 < len(moved) * (shards + 1) / 7000 < 1.15


async def test_jobs_of_one_prompt_are_on_one_shard_and_all_are_answered(own_redis):
    servers = [own_redis() for _ in range(3)]
    async with sharded(servers, work=False) as q:
        jobs = [job(f"{i}-{k}", prompt, response=(k,)) for i, prompt in enumerate(PROMPTS[:40]) for k in range(3)]
        waits = await q.producer.submit(jobs)
        places = {}
        for i, server in enumerate(servers):
            with server.client() as client:
                places |= {name.decode(): i for name in client.hkeys(KEYS.of(q.producer.served).key("open"))}
        assert set(places) == set(ids(jobs)) and set(places.values()) == {0, 1, 2}
        assert all(len({places[f"{i}-{k}"] for k in range(3)}) == 1 for i in range(40))
        q.run(q.work)
        outcomes = await asyncio.gather(*waits)
        assert [outcome.job_id for outcome in outcomes] == ids(jobs)
        assert set(q.seen.values()) == {1}
        await q.producer.live()
        assert metrics.QUEUE_JOBS._value.get() == 0 and metrics.WORKERS._value.get() == 1
        for server in servers:
            with server.client() as client:
                assert endless(client) == []


async def test_a_request_that_is_sent_again_meets_the_first_one(own_redis):
    async with sharded([own_redis(), own_redis()], work=False) as q:
        front = SingleFlight(q.producer, window=5.0, current=lambda _: True)
        [prompt] = on(1, 2)
        [first] = await front.submit([job("a", prompt)])
        [again] = await front.submit([job("b", prompt)])
        assert q.producer.shards[0].open_jobs == 0 and q.producer.shards[1].open_jobs == 1
        q.run(q.work)
        assert [(await first).job_id, (await again).job_id] == ["a", "b"]
        assert q.seen == {"a": 1}


async def test_a_worker_takes_from_all_shards_alike(own_redis):
    async with sharded([own_redis(), own_redis()], work=False) as q:
        jobs = [job(f"{shard}-{i}", p) for shard in (0, 1) for i, p in enumerate(on(shard, 2, 100))]
        await q.producer.submit(jobs)
        taken = Counter()
        while taken.total() < 100:
            taken.update(one.id[0] for one in await q.consumer.take(jobs[0].group.tokens * 10))
        assert abs(taken["0"] - taken["1"]) <= 20


async def test_the_others_take_what_a_lost_shard_had_and_say_so(own_redis, caplog):
    caplog.set_level(logging.INFO, logger="inward")
    servers = [own_redis(appendonly="yes") for _ in range(3)]
    async with sharded(servers, ttl=1.0) as q:
        servers[1].kill()
        await until(lambda: q.producer.lost and q.consumer.lost)
        assert q.producer.away is None and q.consumer.problem is None
        assert q.producer.lost.startswith("shard 2 of 3 is away: Redis can't be reached")
        [there], lost = on(0, 3), on(1, 3, 20)
        jobs = [job("a", there), *(job(i, prompt) for i, prompt in enumerate(lost))]
        outcomes = await asyncio.gather(*await q.producer.submit(jobs))
        assert [outcome.job_id for outcome in outcomes] == ids(jobs)
        assert all(isinstance(outcome, Scored) for outcome in outcomes)
        [alone] = await asyncio.gather(*await q.producer.submit([job("alone", lost[0])]))
        assert isinstance(alone, Scored)
        with pytest.raises(ShardAway, match=r"shard 2 of 3 .*\(\w+\)$"):  # a bulk job can wait, so nothing of it moves
            await q.producer.submit([job("d", there, priority="bulk"), job("e", lost[0], priority="bulk")])
        assert q.producer.open_jobs == 0
        servers[1].start()
        await until(lambda: not q.producer.lost and not q.consumer.lost and q.producer.shards[1].workers)
        [outcome] = await asyncio.gather(*await q.producer.submit([job("f", lost[0])]))
        assert isinstance(outcome, Scored)


async def test_a_lost_shard_is_shared_out_among_all_others(own_redis):
    moved = Counter(shards_of((i, 3), 4)[1] for i in range(7000) if shard_of((i, 3), 4) == 2)
    assert set(moved) == {0, 1, 3} and max(moved.values()) < 1.15 * min(moved.values())


async def test_what_the_others_have_no_room_to_spare_for_fails_and_their_own_goes_on(own_redis):
    servers = [own_redis(), own_redis()]
    async with sharded(servers, max_tokens=80, ttl=PATIENCE, work=False) as q:
        [a, *_], [b, *_] = on(0, 2, 2), on(1, 2, 2)
        servers[1].kill()
        await until(lambda: q.producer.lost)
        await q.producer.submit([job("own", a, response=(1,) * 10)])  # 13 of 40
        [first] = await q.producer.submit([job("first", b)])  # 18 of 20
        with pytest.raises(ShardAway, match="no room to spare"):
            await q.producer.submit([job("second", b)])
        own, second = await q.producer.submit([job("more", a), job("second", b)])
        assert (await second).code == ShardAway.code and "no room to spare" in (await second).message
        q.run(q.work)
        assert isinstance(await own, Scored) and isinstance(await first, Scored)


async def test_what_the_next_shard_has_no_room_for_goes_to_the_one_after_it(own_redis):
    servers = [own_redis() for _ in range(3)]
    async with sharded(servers, max_tokens=120, work=False) as q:
        lost = [prompt for prompt in PROMPTS if shards_of(prompt, 3) == [1, 0, 2]]
        servers[1].kill()
        await until(lambda: q.producer.lost)
        before = rejections()
        await q.producer.submit([job("own", on(0, 3)[0], response=(1,) * 15)])  # 18 of 20 that it may spare
        waits = await q.producer.submit([job(i, prompt) for i, prompt in enumerate(lost[:3])])  # 15 tokens
        assert q.producer.shards[2].open_jobs == 3
        waits += await q.producer.submit([job("last", lost[3])])
        with pytest.raises(ShardAway, match="no room to spare"):
            await q.producer.submit([job("none", lost[4])])
        assert rejections() == before  # the queue is not full: it lacks a shard, which other figures say
        q.run(q.work)
        assert all(isinstance(outcome, Scored) for outcome in await asyncio.gather(*waits))


async def test_a_frozen_shard_is_waited_for_once_and_then_its_jobs_go_elsewhere_at_once(own_redis, monkeypatch):
    servers = [own_redis(), own_redis()]
    async with sharded(servers) as q:
        lost, asked = on(1, 2, 20), []
        await asyncio.gather(*await q.producer.submit([job("before", lost[0])]))  # the shard knows the script by now
        servers[1].signal(signal.SIGSTOP)
        try:
            outcomes = await asyncio.gather(*await q.producer.submit([job("first", lost[0])]))
            client = q.connections[1]._client
            execute = client.execute_command

            def watched(*command):
                asked.append(command[0])
                return execute(*command)

            monkeypatch.setattr(client, "execute_command", watched)
            for i, prompt in enumerate(lost):
                outcomes += await asyncio.gather(*await q.producer.submit([job(i, prompt)]))
            assert all(isinstance(outcome, Scored) for outcome in outcomes)
            assert set(asked) <= {"PING"}
            assert q.producer.lost.startswith("shard 2 of 2 is away")
            q.tasks.pop().cancel()  # nobody works until the shard, which may find the first job now, is told who left
        finally:
            servers[1].signal(signal.SIGCONT)
        await until(lambda: not q.producer.lost and not q.consumer.lost)
        q.run(q.work)
        assert isinstance(*await asyncio.gather(*await q.producer.submit([job("last", lost[0])])), Scored)
        assert q.seen["first"] == 1


async def test_who_waits_for_a_shard_that_goes_is_answered_in_time(own_redis):
    servers = [own_redis(), own_redis()]
    async with sharded(servers, ttl=0.5, work=False) as q:
        [lost] = on(1, 2)
        interactive, bulk = await q.producer.submit([job("a", lost), job("b", lost, priority="bulk")])
        servers[1].kill()
        assert (await asyncio.wait_for(interactive, PATIENCE)).code == ShardAway.code
        assert not bulk.done()
        servers[1].start()  # it has forgotten everything: the bulk job is sent again, the other one is not
        q.run(q.work)
        assert isinstance(await asyncio.wait_for(bulk, PATIENCE), Scored)
        assert q.seen == {"b": 1}


async def test_under_load_a_shard_dies_and_comes_back_and_nobody_waits_for_ever(own_redis):
    servers = [own_redis(appendonly="yes", appendfsync="always") for _ in range(3)]
    async with sharded(servers, ttl=0.5) as q:
        outcomes = {0: Counter(), 1: Counter(), 2: Counter()}

        async def call(name, prompt):
            try:
                [wait] = await q.producer.submit([job(name, prompt)])
                outcome = await wait
                said = outcome.code if isinstance(outcome, Failed) else "scored"
            except Unavailable as error:
                said = error.code
            outcomes[shard_of(prompt, 3)][said] += 1

        async def load(rounds, name):
            for i in range(rounds):
                await asyncio.gather(*(call(f"{name}-{i}-{k}", prompt) for k, prompt in enumerate(PROMPTS[:30])))

        await load(3, "before")
        assert {said for counts in outcomes.values() for said in counts} == {"scored"}
        loading = asyncio.create_task(load(20, "during"))
        await asyncio.sleep(0.05)
        servers[2].kill()
        await asyncio.wait_for(loading, 3 * PATIENCE)
        assert set(outcomes[0]) == set(outcomes[1]) == {"scored"}
        assert outcomes[2]["scored"] > outcomes[2][ShardAway.code]  # those on their way when it went
        assert set(outcomes[2]) <= {"scored", ShardAway.code}
        servers[2].start()
        await until(lambda: not q.producer.lost and not q.consumer.lost and q.producer.shards[2].workers)
        for counts in outcomes.values():
            counts.clear()
        await load(3, "after")
        assert {said for counts in outcomes.values() for said in counts} == {"scored"}


async def test_the_home_may_be_away_while_pairs_of_the_others_go_on(own_redis):
    servers = [own_redis(appendonly="yes"), own_redis()]
    async with sharded(servers, ttl=1.0) as q:
        servers[0].kill()
        await until(lambda: q.producer.lost and q.consumer.lost)
        [outcome] = await asyncio.gather(*await q.producer.submit([job("a", on(1, 2)[0])]))
        assert isinstance(outcome, Scored) and q.producer.lost.startswith("shard 1 of 2 is away")


async def test_with_all_shards_away_the_queue_is(own_redis):
    servers = [own_redis(), own_redis()]
    async with sharded(servers) as q:
        for server in servers:
            server.kill()
        await until(lambda: q.producer.away and q.consumer.away)
        assert q.producer.lost is q.consumer.lost is None
        with pytest.raises(Unavailable, match=r"^Redis can't be reached") as refused:
            await q.producer.submit([job("a", PROMPTS[0])])
        assert not isinstance(refused.value, ShardAway)


async def test_who_waits_while_all_shards_go_is_told_of_no_single_one(own_redis):
    servers = [own_redis(), own_redis()]
    async with sharded(servers, ttl=0.5, work=False) as q:
        waits = await q.producer.submit([job("a", on(0, 2)[0]), job("b", on(1, 2)[0])])
        for server in servers:
            server.kill()
        outcomes = await asyncio.wait_for(asyncio.gather(*waits), PATIENCE)
        assert [outcome.code for outcome in outcomes][-1] == Unavailable.code


async def test_without_any_worker_it_is_the_worker_that_is_missed_and_no_shard(own_redis):
    connections = [Connection(own_redis().url) for _ in range(2)]
    producer = ShardedProducer(connections, KEYS, max_tokens=100)
    await producer.live()
    before = rejections()
    for i, jobs in enumerate(([job("a", on(0, 2)[0])], [job("b", on(0, 2)[0]), job("c", on(1, 2)[0])]), 1):
        with pytest.raises(EngineDead, match="no worker"):
            await producer.submit(jobs)
        assert rejections() == before | {"no_worker": before["no_worker"] + i}
    await producer.leave()
    for connection in connections:
        await connection.close()


async def test_what_was_computed_for_a_shard_that_went_is_told_when_it_is_back(own_redis):
    servers = [own_redis(), own_redis(appendonly="yes", appendfsync="always")]
    async with sharded(servers, work=False) as q:
        [wait] = await q.producer.submit([job("a", on(1, 2)[0])])
        [other] = await q.producer.submit([job("b", on(0, 2)[0])])
        taken = [*await q.consumer.take(1000)]
        while len(taken) < 2:
            taken += await q.consumer.take(1000)
        q.run(lambda: q.consumer.take(1000))  # who asks for more notices at once
        servers[1].kill()
        await until(lambda: q.consumer.lost)
        assert sorted(ids(await q.consumer.wanted(taken))) == ["a", "b"]
        await asyncio.wait_for(q.consumer.settle([done(one) for one in taken]), PATIENCE)
        assert (await other).job_id == "b" and not wait.done()
        servers[1].start()
        assert (await asyncio.wait_for(wait, PATIENCE)).job_id == "a"


async def test_a_request_is_admitted_by_all_its_shards_or_by_none(own_redis):
    async with sharded([own_redis(), own_redis()], max_tokens=20, work=False) as q:
        [a], [b] = on(0, 2), on(1, 2)
        await q.producer.submit([job("full", b, response=(1,) * 8)])
        before = rejections()
        with pytest.raises(Overloaded):
            await q.producer.submit([job("x", a), job("y", b)])
        assert q.producer.open_jobs == 1
        await q.producer.submit([job("full, too", a, response=(1,) * 8)])
        with pytest.raises(Overloaded):
            await q.producer.submit([job("x", a), job("y", b)])
        assert rejections() == before | {"queue_full": before["queue_full"] + 2}
        await q.producer.close()
        with pytest.raises(Overloaded, match="shutting down"):
            await q.producer.submit([job("x", a)])
        assert rejections() == before | {"queue_full": before["queue_full"] + 2}


async def test_what_fits_the_whole_but_not_its_shard_s_part_has_what_the_others_leave(own_redis):
    async with sharded([own_redis(), own_redis()], max_tokens=40, work=False) as q:
        [a, *_], [b, *_] = on(0, 2, 2), on(1, 2, 2)
        await q.producer.submit([job("small", b)])  # 5 tokens: the shard is not empty
        await q.producer.submit([job("large", b, response=(1,) * 26)])  # of a part of 20
        with pytest.raises(Overloaded, match="34 of 20"):
            await q.producer.submit([job("more", b)])
        await q.producer.abandon(["large"])
        await q.producer.submit([job("other", a, response=(1,) * 14)])
        await until(lambda: q.producer._beats[0].tokens == 17)
        with pytest.raises(Overloaded, match="5 of 23"):
            await q.producer.submit([job("again", b, response=(1,) * 26)])
        await q.producer.abandon(["small"])
        await q.producer.submit([job("alone", b, response=(1,) * 26)])  # a shard that is empty takes anything


async def test_pieces_of_a_told_job_come_by_its_shard(own_redis):
    async with sharded([own_redis(), own_redis()], work=False) as q:
        heard = []
        await q.producer.submit([job("a", on(1, 2)[0], told=True)], heard.append)
        await q.consumer.take(1000)
        assert await q.consumer.tell(Piece("a", 0, "Hi"))
        await until(lambda: heard)
        assert heard == [Piece("a", 0, "Hi")]


async def test_a_worker_of_other_weights_gets_nothing_from_any_shard(own_redis):
    servers = [own_redis(), own_redis()]
    async with sharded(servers) as q:
        connections = [Connection(server.url) for server in servers]
        other = ShardedConsumer(connections, KEYS.of("another"), idle=PATIENCE, ttl=PATIENCE)
        keeping = asyncio.create_task(other.keep())
        taking = asyncio.create_task(other.take(100))
        try:
            await until(lambda: other.problem and "other weights" in other.problem)
            await asyncio.gather(*await q.producer.submit([job(i, p) for i, p in enumerate(PROMPTS[:20])]))
            assert not taking.done() and set(q.seen.values()) == {1}
        finally:
            for task in (keeping, taking):
                task.cancel()
            await asyncio.gather(keeping, taking, return_exceptions=True)
            await other.leave()
            for connection in connections:
                await connection.close()


async def test_a_closed_worker_gives_what_it_has_and_ends(own_redis):
    async with sharded([own_redis(), own_redis()], work=False) as q:
        await q.consumer.close()
        with pytest.raises(Closed):
            await asyncio.wait_for(q.consumer.take(100), PATIENCE)


async def test_a_closed_worker_waits_for_the_last_shard_without_spinning(own_redis, monkeypatch):
    async with sharded([own_redis(), own_redis()], work=False) as q:

        async def slow(tokens):
            await asyncio.sleep(0.3)
            raise Closed

        waits = []

        def wait(*args, **kwargs):
            waits.append(args)
            return wait_for_some(*args, **kwargs)

        wait_for_some = asyncio.wait
        monkeypatch.setattr(q.consumer.shards[1], "take", slow)
        monkeypatch.setattr(asyncio, "wait", wait)
        await q.consumer.close()
        with pytest.raises(Closed):
            await asyncio.wait_for(q.consumer.take(100), PATIENCE)
        assert len(waits) < 10
        with pytest.raises(Closed):
            await q.consumer.take(100)


async def test_who_leaves_waits_for_a_shard_that_is_slow(own_redis, monkeypatch):
    async with sharded([own_redis(), own_redis()], work=False) as q:
        [wait] = await q.producer.submit([job("a", on(1, 2)[0])])
        shard = q.consumer.shards[1]
        settle = shard.settle

        async def slow(outcomes):
            await asyncio.sleep(2 * PATIENCE_S)
            await settle(outcomes)

        monkeypatch.setattr(shard, "settle", slow)
        await q.consumer.settle([done(one) for one in await q.consumer.take(1000)])
        assert not wait.done()
        await q.consumer.leave()
        assert (await asyncio.wait_for(wait, PATIENCE)).job_id == "a"
