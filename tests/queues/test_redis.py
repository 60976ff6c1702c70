"""What the queue in Redis promises beyond the contract: deaths, freezes, priorities, dead letters, a Redis that is
away or full."""

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from inward import metrics
from inward.errors import EngineDead, InternalError, SetupError, Unavailable
from inward.queues.redis import redelivery, scripts
from inward.queues.redis.consumer import RedisConsumer
from inward.queues.redis.producer import REPLIES_S, RedisProducer
from inward.stores.connection import Connection
from inward.stores.keys import GROUP, Keys
from inward.types import Piece
from support.queues import BEATING, KEYS, REPLICA, WORKER, age, done, endless, ids, in_redis, job, living
from support.redis_server import CLUSTERED, join
from support.waiting import PATIENCE, until


@pytest.fixture
async def fleet(redis_server):
    """Opens replicas and workers around the shared Redis and closes them in the end."""
    async with AsyncExitStack() as stack:
        yield Standalone(redis_server, stack)


class Standalone:
    def __init__(self, server, stack):
        self.server, self._stack = server, stack

    async def connection(self):
        connection = Connection(self.server.url, timeout=PATIENCE)
        self._stack.push_async_callback(connection.close)
        return connection

    async def worker(self, keys=KEYS, **options):
        worker = RedisConsumer(await self.connection(), keys, **{**WORKER, **options})
        return await self._stack.enter_async_context(living(worker))

    async def replica(self, **options):
        replica = RedisProducer(await self.connection(), KEYS, **{"max_tokens": 10**6, **REPLICA, **options})
        return await self._stack.enter_async_context(living(replica))

    def freeze(self, worker):
        """No sign of life and no renewal from now on, as after SIGSTOP, and that long ago."""
        worker.stop()
        age(self.server, worker.worker)

    def pending(self):
        with self.server.client() as client:
            return sum(client.xpending(stream, "workers")["pending"] for stream in KEYS.streams)

    def empty(self):
        """Whether Redis holds no job, no claim, no dead letter and counts no token."""
        with self.server.client() as client:
            lengths = [client.xlen(key) for key in (*KEYS.streams, KEYS.dead)]
            return not any(lengths) and not client.exists(KEYS.key("open"), KEYS.key("tokens")) and not self.pending()


async def next_of(worker, tokens=10_000):
    return await asyncio.wait_for(worker.take(tokens), PATIENCE)


async def test_the_jobs_of_a_dead_worker_are_taken_over(fleet):
    frozen, replica = await fleet.worker(), await fleet.replica()
    waits = await replica.submit([job(i) for i in range(3)])
    assert ids(await next_of(frozen)) == ["0", "1", "2"]
    fleet.freeze(frozen)
    heir = await fleet.worker()
    batch = await next_of(heir)
    assert [(j.id, j.deliveries, j.alone) for j in batch] == [("0", 2, False), ("1", 2, False), ("2", 2, False)]
    await heir.settle([done(j, "heir") for j in batch])
    assert {o.message for o in await asyncio.gather(*waits)} == {"heir"}
    assert fleet.empty()


async def test_the_jobs_of_a_worker_that_gives_no_sign_of_life_are_for_others_however_young_its_claims_are(fleet):
    dead, replica = await fleet.worker(ttl=0.3), await fleet.replica()
    waits = await replica.submit([job(i) for i in range(20)])
    heir = await fleet.worker()  # it has looked before there was anything to inherit
    assert len(await next_of(dead)) == 20
    inheriting = asyncio.create_task(next_of(heir))
    dead.stop()
    batch = await inheriting
    assert [j.deliveries for j in batch] == [2] * redelivery.AT_ONCE
    await heir.settle([done(j, "heir") for j in batch])
    batch = await next_of(heir)
    assert len(batch) == 20 - redelivery.AT_ONCE
    await heir.settle([done(j, "heir") for j in batch])
    assert {o.message for o in await asyncio.gather(*waits)} == {"heir"}
    assert fleet.empty()
    with fleet.server.client() as client:

        async def forgotten():
            return await heir.look(100) == [] and not client.exists(KEYS.gone)

        await until(forgotten)


async def test_a_worker_that_is_only_late_keeps_what_nobody_has_taken_over(fleet):
    late, replica = await fleet.worker(ttl=0.3), await fleet.replica()
    await replica.submit([job("a")])
    taken = await next_of(late)
    late.stop()
    heir = await fleet.worker(wait=0)
    heir._inherit_at = PATIENCE + heir._clock()  # it is not its time to look
    with fleet.server.client() as client:
        await until(lambda: client.zcount(KEYS.workers, "-inf", 1000 * client.time()[0]))  # its time is over
        await heir.publish()
        assert client.smembers(KEYS.gone) == {late.worker.encode()}
        await late.live()
        assert client.smembers(KEYS.gone) == set()
    heir._inherit_at = 0.0
    assert await heir.look(100) == []
    assert ids(await late.wanted(taken)) == ["a"]


async def test_what_a_leaving_worker_does_not_know_to_be_its_own_is_for_others_at_once(fleet):
    leaving, replica = await fleet.worker(), await fleet.replica()
    await replica.submit([job("a")])
    heir = await fleet.worker()
    with fleet.server.client() as client:  # as if the answer to it had been cut off
        client.xreadgroup("workers", leaving.worker, {KEYS.streams[0]: ">"})
    await leaving.leave()
    assert [(j.id, j.deliveries) for j in await next_of(heir)] == [("a", 2)]


async def test_the_last_delivery_is_alone_and_one_at_a_time(fleet):
    first, replica = await fleet.worker(max_deliveries=2), await fleet.replica()
    waits = await replica.submit([job(i) for i in range(3)])
    await next_of(first)
    fleet.freeze(first)
    heir = await fleet.worker(max_deliveries=2)
    for _ in range(3):
        suspect = await one(heir)
        assert (suspect.deliveries, suspect.alone) == (2, True)
        await replica.submit([job(f"fresh {suspect.id}")])
        fresh = await one(heir)  # no second suspect while there is one in hand
        assert (fresh.deliveries, fresh.alone) == (1, False)
        await heir.settle([done(suspect), done(fresh)])
    await asyncio.gather(*waits)
    assert fleet.empty()


async def test_what_was_claimed_and_never_arrived_is_found_again(fleet):
    worker, replica = await fleet.worker(), await fleet.replica()
    [wait] = await replica.submit([job("a")])
    with fleet.server.client() as client:  # as if the answer to it had been cut off
        client.xreadgroup("workers", worker.worker, {KEYS.streams[0]: ">"})
    worker._failed(Unavailable("away"))
    found = await one(worker)
    assert (found.id, found.deliveries) == ("a", 1)
    await worker.settle([done(found, "found")])
    assert (await wait).message == "found"
    assert fleet.empty()


async def test_a_redis_that_goes_away_between_two_reads_takes_no_claimed_job_along(fleet, monkeypatch):
    worker, replica = await fleet.worker(), await fleet.replica()
    await replica.submit([job("a")])
    read, calls = worker._read, []

    async def failing(*args, **options):
        calls.append(args)
        if len(calls) == 2:  # the bulk jobs, when the interactive ones are claimed
            raise Unavailable("gone")
        return await read(*args, **options)

    monkeypatch.setattr(worker, "_read", failing)
    assert ids(await next_of(worker)) == ["a"]
    assert len(calls) > 2


async def test_an_idle_worker_finds_what_it_has_been_given_and_does_not_know_of(fleet):
    worker, replica = await fleet.worker(), await fleet.replica()
    await replica.submit([job("a")])
    assert ids(await next_of(worker)) == ["a"]
    worker._drop("a")  # as an earlier delivery of it, settled late, does after Redis came back without its last second
    assert ids(await next_of(worker)) == ["a"]


async def test_a_worker_that_wakes_up_late_neither_answers_again_nor_computes_what_is_done(fleet):
    frozen, replica = await fleet.worker(), await fleet.replica()
    waits = await replica.submit([job("a"), job("b")])
    late = await next_of(frozen)
    fleet.freeze(frozen)
    heir = await fleet.worker()
    await heir.settle([done(j, "heir") for j in await next_of(heir)])
    assert await frozen.wanted(late) == []
    await frozen.settle([done(j, "late") for j in late])
    assert [o.message for o in await asyncio.gather(*waits)] == ["heir", "heir"]
    assert fleet.empty()
    [wait] = await replica.submit([job("c")])
    await frozen.settle([done(await one(frozen), "it goes on serving")])
    assert (await wait).message == "it goes on serving"


async def test_a_late_answer_to_a_job_that_is_still_open_counts_and_the_next_one_does_not(fleet):
    frozen, replica = await fleet.worker(), await fleet.replica()
    [wait] = await replica.submit([job("a")])
    late = await next_of(frozen)
    fleet.freeze(frozen)
    heir = await fleet.worker()
    again = await one(heir)
    await frozen.settle([done(late[0], "first")])
    await heir.settle([done(again, "second")])
    assert (await wait).message == "first"
    assert fleet.empty()


async def test_a_worker_that_stalled_does_not_take_over_what_it_has_in_hand_itself(fleet):
    stalled, replica = await fleet.worker(max_deliveries=2), await fleet.replica()
    waits = await replica.submit([job(i) for i in range(40)])
    slow = await next_of(stalled)
    for i in range(3):
        fleet.freeze(stalled)
        stalled._reclaim_at = 0.0  # it is time to look for the dead
        waits += await replica.submit([job(f"next {i}")])
        assert ids(await next_of(stalled)) == [f"next {i}"]
        await stalled.settle([done(job(f"next {i}"))])
    await stalled.settle([done(j, "first") for j in slow])
    assert [o.message for o in await asyncio.gather(*waits)] == ["first"] * 40 + [""] * 3
    assert fleet.empty()


async def test_a_worker_that_stalled_still_finds_the_jobs_of_the_dead_behind_its_own(fleet):
    stalled, replica = await fleet.worker(), await fleet.replica()
    await replica.submit([job(i) for i in range(40)])
    await next_of(stalled)
    dead = await fleet.worker()
    await replica.submit([job("of the dead")])
    await one(dead)
    fleet.freeze(stalled)
    fleet.freeze(dead)
    stalled._reclaim_at = 0.0
    again = await one(stalled)
    assert (again.id, again.deliveries) == ("of the dead", 2)


async def test_only_claims_that_somebody_took_over_count_as_lost(fleet, monkeypatch):
    def lost():
        return metrics.REGISTRY.get_sample_value("inward_claims_lost_total")

    worker, replica = await fleet.worker(), await fleet.replica()
    await replica.submit([job(name) for name in ("settled", "abandoned", "lost", "kept")])
    batch = await next_of(worker)
    with fleet.server.client() as client:
        entry = client.xrange(KEYS.streams[0])[2][0]
        client.xclaim(KEYS.streams[0], GROUP, "somebody else", 0, [entry])
    await replica.abandon(["abandoned"])
    script, settled, told, before = worker._redis.script, asyncio.Event(), asyncio.Event(), lost()

    async def slowly(lua, *args):
        answer = await script(lua, *args)
        if lua is scripts.SETTLE:
            settled.set()
            await told.wait()
        return answer

    monkeypatch.setattr(worker._redis, "script", slowly)
    settling = asyncio.create_task(worker.settle([done(batch[0])]))
    await settled.wait()
    await (
        worker._renew()
    )  # as it happens between the moment at which Redis settles a job and that at which the worker hears it
    told.set()
    await settling
    assert (lost() - before, list(worker._claims)) == (1, ["kept"])


async def one(worker):
    [taken] = await next_of(worker)
    return taken


async def test_a_worker_that_lives_keeps_its_claims_however_long_it_computes(fleet):
    idle, slow, replica = await fleet.worker(), await fleet.worker(idle=0.3), await fleet.replica()
    [wait] = await replica.submit([job("a")])
    held = await next_of(slow)
    taking = asyncio.create_task(idle.take(1000))
    for _ in range(3):
        age(fleet.server, slow.worker, PATIENCE / 2)
        with fleet.server.client() as client:
            await until(
                lambda client=client: (
                    not client.xpending_range(KEYS.streams[0], "workers", "-", "+", 1, idle=round(500 * PATIENCE))
                )
            )
    assert not taking.done()
    assert ids(await slow.wanted(held)) == ["a"]
    await slow.settle([done(held[0], "slow")])
    assert (await wait).message == "slow"
    taking.cancel()
    await asyncio.wait([taking])


async def test_a_job_that_ends_every_worker_becomes_a_dead_letter_and_its_neighbours_are_answered(fleet):
    *doomed, survivor = [await fleet.worker(max_deliveries=3) for _ in range(4)]
    replica = await fleet.replica()
    before, poison, after = await replica.submit([job("before"), job("poison"), job("after")])
    for worker in doomed:
        await asyncio.wait_for(serve_until_poisoned(worker), PATIENCE)
        fleet.freeze(worker)
    serving = asyncio.create_task(serve_until_poisoned(survivor))
    await asyncio.wait([before, poison, after], timeout=PATIENCE)
    serving.cancel()
    await asyncio.wait([serving])
    assert [wait.result().message for wait in (before, after)] == ["fine", "fine"]
    assert poison.result().code == InternalError.code
    assert "3 workers ended while they had it" in poison.result().message
    with fleet.server.client() as client:
        [(_, letter)] = client.xrange(KEYS.dead)
        assert (letter[b"id"], letter[b"deliveries"]) == (b"poison", b"4")
        client.delete(KEYS.dead)
    assert fleet.empty()


async def serve_until_poisoned(worker):
    while "poison" not in ids(batch := await worker.take(10_000)):
        await worker.settle([done(j, "fine") for j in batch])


async def test_jobs_of_a_replica_that_died_are_not_computed_and_free_their_room(fleet):
    worker = await fleet.worker()
    dead = await fleet.replica()
    await dead.submit([job("a"), job("b")])
    taken = await next_of(worker)
    dead.stop()
    with fleet.server.client() as client:
        assert 0 < client.pttl(KEYS.alive(dead.replica)) <= 1000 * PATIENCE
        client.pexpire(KEYS.alive(dead.replica), 0)
    assert await worker.wanted(taken) == []
    assert fleet.empty()


async def test_released_jobs_are_taken_over_at_once(fleet):
    broken, replica = await fleet.worker(), await fleet.replica()
    await replica.submit([job("a"), job("b")])
    taken = await next_of(broken)
    heir = await fleet.worker()
    waiting = asyncio.create_task(next_of(heir))
    await broken.release(taken, "CUDA error")
    assert [(j.id, j.deliveries) for j in await waiting] == [("a", 2), ("b", 2)]
    assert await broken.wanted(taken) == []


async def test_what_a_leaving_worker_had_not_begun_is_delivered_again_as_if_it_were_new(fleet):
    leaving, replica = await fleet.worker(), await fleet.replica()
    await replica.submit([job("a"), job("b")])
    await next_of(leaving, tokens=10)
    await leaving.leave()
    heir = await fleet.worker()
    assert sorted((j.id, j.deliveries) for j in await next_of(heir)) == [("a", 1), ("b", 1)]
    with fleet.server.client() as client:
        assert client.zrange(KEYS.workers, 0, -1) == [heir.worker.encode()]


async def test_interactive_jobs_go_first_and_bulk_jobs_do_not_starve(fleet):
    worker, replica = await fleet.worker(), await fleet.replica()
    await replica.submit([job(f"b{i}", priority="bulk") for i in range(5)])
    await replica.submit([job(f"i{i}") for i in range(40)])
    order = []
    while len(order) < 45:
        order += ids(await next_of(worker, tokens=10))
    assert sum(name.startswith("i") for name in order[:5]) >= 4
    assert min(order.index(f"b{i}") for i in range(5)) < 20


async def test_what_redis_forgot_is_sent_again(fleet):
    worker, replica = await fleet.worker(), await fleet.replica(**BEATING)
    waits = await replica.submit([job("a"), job("b")])
    with fleet.server.client() as client:
        client.flushall()
    batch = []
    while len(batch) < 2:
        batch += await next_of(worker)
    await worker.settle([done(j, "again") for j in batch])
    assert [o.message for o in await asyncio.wait_for(asyncio.gather(*waits), PATIENCE)] == ["again"] * 2
    assert fleet.empty()


async def test_without_a_worker_nobody_is_admitted(fleet):
    replica = await fleet.replica(**BEATING)
    with pytest.raises(EngineDead) as caught:
        await replica.submit([job("a")])
    assert caught.value.retry_after
    worker = await fleet.worker()
    await until(lambda: replica.workers)
    await replica.submit([job("a")])
    assert ids(await next_of(worker)) == ["a"]


async def test_an_unreadable_job_becomes_a_dead_letter_and_its_caller_gets_an_error(fleet, monkeypatch):
    worker, replica = await fleet.worker(), await fleet.replica()
    with monkeypatch.context() as patch:
        patch.setattr("inward.codec.VERSION", 9)
        waits = await replica.submit([job("newer")])
    await replica.submit([job("fine")])
    assert ids(await next_of(worker)) == ["fine"]
    assert "of one version" in (await waits[0]).message
    with fleet.server.client() as client:
        assert client.xlen(KEYS.dead) == 1


async def test_two_queues_in_one_redis_do_not_see_each_other(fleet):
    async with in_redis(fleet.server.url) as q:
        other = RedisProducer(q.redis, Keys("other"), max_tokens=100)
        await other.live()
        with pytest.raises(EngineDead):
            await other.submit([job("a")])
        await other.leave()


async def test_replies_are_deleted_once_they_are_read(fleet):
    worker, replica = await fleet.worker(), await fleet.replica()
    for i in range(20):
        [wait] = await replica.submit([job(i)])
        await worker.settle([done(j) for j in await next_of(worker)])
        await wait
    with fleet.server.client() as client:
        await until(lambda: client.xlen(KEYS.replies(replica.replica)) == 0)


async def test_who_takes_a_job_over_tells_it_from_the_start_and_the_former_worker_tells_nothing_more(fleet):
    frozen, replica, heard = await fleet.worker(), await fleet.replica(), []
    [wait] = await replica.submit([job("a", told=True)], heard.append)
    [taken] = await next_of(frozen)
    assert await frozen.tell(Piece("a", 0, "one "))
    fleet.freeze(frozen)
    heir = await fleet.worker()
    [again] = await next_of(heir)
    assert again.told
    assert not await frozen.tell(Piece("a", 4, "two "))
    assert await heir.tell(Piece("a", 0, "one "))
    await heir.settle([done(again)])
    await wait
    assert [piece.text for piece in heard] == ["one ", "one "]
    assert ids([taken]) == ["a"]


async def test_a_replica_that_reads_too_slowly_loses_pieces_and_no_outcome(fleet, monkeypatch):
    monkeypatch.setattr("inward.queues.redis.consumer.MOST_PIECES", 3)
    worker, replica, heard = await fleet.worker(), await fleet.replica(), []
    waits = await replica.submit([job("a", told=True), job("b", told=True)], heard.append)
    taken = await next_of(worker)
    replica.stop()
    told = [await worker.tell(Piece("a", i, "x")) for i in range(5)]
    assert told == [True, True, True, False, False]
    await worker.settle([done(j) for j in taken])
    assert await replica.receive() == 5
    assert len(await asyncio.gather(*waits)) == 2
    assert [piece.start for piece in heard] == [0, 1, 2]


async def test_nothing_is_told_while_redis_is_full_or_to_a_replica_that_is_gone(fleet):
    worker, replica = await fleet.worker(), await fleet.replica()
    await replica.submit([job("a", told=True)], lambda piece: None)
    await next_of(worker)
    with fleet.server.client() as client:
        client.config_set("maxmemory", 1)
        assert not await worker.tell(Piece("a", 0, "x"))
        client.config_set("maxmemory", 0)
        assert await worker.tell(Piece("a", 0, "x"))
        assert client.ttl(KEYS.replies(replica.replica)) in (-2, *range(1, REPLIES_S + 1))  # -2: it was read already
        client.delete(KEYS.alive(replica.replica))
        assert not await worker.tell(Piece("a", 1, "x"))


async def test_a_wrong_password_is_said_at_once(own_redis):
    server = own_redis(requirepass="right")
    async with connected(server.url) as right:
        await right.check()
    async with connected(server.url.replace("right", "wrong")) as wrong:
        with pytest.raises(SetupError, match="password"):
            await wrong.check()


@asynccontextmanager
async def connected(url):
    connection = Connection(url, timeout=PATIENCE)
    try:
        yield connection
    finally:
        await connection.close()


async def test_all_keys_of_a_queue_live_in_one_slot_of_a_cluster(own_redis):
    async with in_redis(join([own_redis(**CLUSTERED) for _ in range(3)])) as q:
        [wait, _] = await q.producer.submit([job("a"), job("b", priority="bulk")])
        await q.consumer.settle([done(j, "there") for j in await q.consumer.wanted(await q.consumer.take(100))])
        assert (await wait).message == "there"


@pytest.mark.parametrize("url", ["http://x", "redis+sentinel://:26379", "redis+sentinel://a:1,b:2"])
def test_a_url_that_cannot_be_used_says_which_ones_can(url):
    with pytest.raises(SetupError, match="redis"):
        Connection(url)


async def test_sentinel_urls_name_sentinels_service_credentials_and_database():
    async with connected("redis+sentinel://user:p%40ss@one:26379,two/mymaster/3?password=s") as connection:
        pool = connection._client.connection_pool
        assert pool.service_name == "mymaster"
        kwargs = pool.connection_kwargs
        assert (kwargs["username"], kwargs["password"], kwargs["db"]) == ("user", "p@ss", 3)
        sentinels = [s.connection_pool.connection_kwargs for s in pool.sentinel_manager.sentinels]
        assert [(s["host"], s["port"], s["password"]) for s in sentinels] == [("one", 26379, "s"), ("two", 26379, "s")]


async def test_a_replica_tells_how_many_jobs_wait_in_redis_and_how_many_are_claimed(redis_server):
    def told():
        lag, pending = (
            [metrics.REGISTRY.get_sample_value(f"inward_stream_{what}", {"stream": s}) for s in ("interactive", "bulk")]
            for what in ("lag", "pending")
        )
        return lag, pending

    async with in_redis(redis_server.url) as q:
        waits = await q.producer.submit([job("a"), job("b"), job("c", priority="bulk")])
        await q.producer.live()
        assert told() == ([2, 1], [0, 0])
        first = await q.consumer.take(10)
        await q.producer.live()
        lag, pending = told()
        assert (sum(lag), sum(pending)) == (3 - len(q.consumer._claims), len(q.consumer._claims))
        await q.consumer.settle([done(j) for j in first])
        while q.consumer._claims or len(first) < 3:
            first += (batch := await q.consumer.take(100))
            await q.consumer.settle([done(j) for j in batch])
        await asyncio.gather(*waits)
        await q.producer.live()
        assert told() == ([0, 0], [0, 0])
        assert metrics.REGISTRY.get_sample_value("inward_dead_letters_kept") == 0


ONE, OTHER = KEYS.of("sha256:one:float32"), KEYS.of("sha256:other:float32")


async def test_workers_of_another_backbone_take_no_jobs_and_say_why(fleet):
    worker, replica = await fleet.worker(ONE), await fleet.replica(**BEATING)
    stranger = await fleet.worker(OTHER)
    assert worker.problem is None
    assert "sha256:one:float32" in stranger.problem and "sha256:other:float32" in stranger.problem
    taking = asyncio.create_task(stranger.take(10_000))
    waits = await replica.submit([job(i) for i in range(20)])
    await worker.settle([done(j, "one") for j in await next_of(worker)])
    assert {o.message for o in await asyncio.gather(*waits)} == {"one"}
    assert not taking.done()
    assert replica.workers == 1
    taking.cancel()
    await asyncio.wait([taking])


@pytest.mark.parametrize("leaves", ["in order", "killed"])
async def test_when_the_last_worker_of_a_backbone_has_gone_another_one_may_serve_the_queue(fleet, leaves):
    replica = await fleet.replica(**BEATING)
    async with living(RedisConsumer(await fleet.connection(), ONE, **WORKER)) as worker:
        heir = await fleet.worker(OTHER, ttl=1.0)
        await until(lambda: replica.workers)
        [before] = await replica.submit([job("before")])
        assert heir.problem
        taken = await next_of(worker)
        if leaves == "killed":
            worker.stop()
            with fleet.server.client() as client:
                client.pexpire(KEYS.served, 1)
                client.delete(KEYS.workers)
            await until(lambda: heir.problem is None)
    await until(lambda: heir.problem is None)
    moved = await asyncio.wait_for(before, PATIENCE)
    assert (moved.code, "another backbone" in moved.message) == ("unavailable", True)
    await worker.settle([done(j, "too late") for j in taken])
    [after] = await replica.submit([job("after")])
    await heir.settle([done(j, "heir") for j in await next_of(heir)])
    assert (await after).message == "heir"


async def test_a_worker_that_lost_the_queue_to_another_backbone_takes_no_more(fleet):
    worker = await fleet.worker(ONE, ttl=1.0)
    with fleet.server.client() as client:
        client.set(KEYS.served, OTHER.backbone)
    await until(lambda: worker.problem)
    assert await worker.look(100) == []
    with fleet.server.client() as client:
        assert client.zrange(KEYS.workers, 0, -1) == []
        client.delete(KEYS.served)
    await until(lambda: worker.problem is None)


async def test_nothing_in_redis_lives_without_an_end(fleet):
    worker, replica = await fleet.worker(), await fleet.replica(**BEATING)
    with fleet.server.client() as client:
        waits = await replica.submit([job("a"), job("b", priority="bulk")])
        assert endless(client) == []
        taken = []
        while len(taken) < 2:
            taken += await next_of(worker)
        await worker.settle([done(j) for j in taken])
        await asyncio.gather(*waits)
        await replica.submit([job("poison")])
        await one(worker)
        fleet.freeze(worker)
        heir = await fleet.worker(max_deliveries=1)
        assert await heir.look(100) == []
        assert client.xlen(KEYS.dead) == 1
        replica.stop()  # killed: nobody reads its replies any more
        [_] = await replica.submit([job("c")])
        await heir.settle([done(j) for j in await next_of(heir)])
        assert client.xlen(KEYS.replies(replica.replica)) == 1
        assert endless(client) == []
        assert 0 < client.ttl(KEYS.replies(replica.replica)) <= REPLIES_S


async def test_signs_of_life_put_off_the_end_of_what_has_none_of_its_own(fleet):
    worker, replica = await fleet.worker(ttl=1.0), await fleet.replica()
    await replica.submit([job("a")])
    with fleet.server.client() as client:
        for key in (KEYS.key("open"), KEYS.key("tokens"), KEYS.streams[0]):
            client.expire(key, 60)
            await until(lambda key=key: client.ttl(key) > 60)
        worker.stop()
        client.expire(KEYS.key("open"), 60)
        await replica.live()
        assert client.ttl(KEYS.key("open")) > 60


async def test_an_entry_that_is_no_job_is_dropped_and_harms_nobody(fleet):
    worker, replica = await fleet.worker(), await fleet.replica()
    with fleet.server.client() as client:
        client.xadd(KEYS.streams[0], {"a": "b"})
        client.xadd(KEYS.streams[0], {"id": "unknown", "to": replica.replica, "job": b"x"})
    [wait] = await replica.submit([job("a")])
    await worker.settle([done(j, "fine") for j in await next_of(worker)])
    assert (await wait).message == "fine"
    with fleet.server.client() as client:
        assert client.xlen(KEYS.streams[0]) == 1  # what is no open job goes once its claim is old
        age(fleet.server, worker.worker)
    heir = await fleet.worker()
    assert await heir.look(100) == []
    assert fleet.empty()
