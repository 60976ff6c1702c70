"""A Redis that is slow, cut off, full, frozen or killed: clear errors, nobody's answer lost, and recovery without a
restart."""

import asyncio
import itertools
import signal

import pytest

from inward.errors import Unavailable
from support.queues import BEATING, KEYS, done, ids, in_redis, job
from support.waiting import PATIENCE, until


class Way:
    """Between us and a Redis: what is sent arrives ``delay`` seconds later, and while ``open`` is not set, when it is
    set again.

    No connection is closed, so that what was given up on may arrive late, as it does over a network.
    """

    def __init__(self, port):
        self._port, self._pumps = port, set()
        self.delay, self.open = 0.0, asyncio.Event()
        self.open.set()

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/0"
        return self

    async def __aexit__(self, *_):
        self._server.close()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _carry(self, reader, writer):
        from_redis, to_redis = await asyncio.open_connection("127.0.0.1", self._port)
        self._pumps |= {
            asyncio.create_task(self._pump(reader, to_redis)),
            asyncio.create_task(self._pump(from_redis, writer)),
        }

    async def _pump(self, reader, writer):
        try:
            while data := await reader.read(65536):
                await asyncio.sleep(self.delay)
                await self.open.wait()
                writer.write(data)
                await writer.drain()
        except OSError:
            pass  # the other end has gone
        finally:
            writer.close()


async def test_a_slow_redis_harms_nobody_and_one_that_is_too_slow_is_a_503(redis_server):
    async with Way(redis_server.port) as way, in_redis(way.url, producer=BEATING) as q:
        running = asyncio.create_task(answering(q.consumer))
        way.delay = 0.1
        waits = await q.producer.submit([job(i) for i in range(20)])
        answers = await asyncio.wait_for(asyncio.gather(*waits), PATIENCE)
        assert [o.message for o in answers] == [str(i) for i in range(20)]
        way.delay, q.redis.timeout = 3.0, 0.5
        with pytest.raises(Unavailable, match="can't be reached") as caught:
            await q.producer.submit([job("too slow")])
        assert caught.value.retry_after
        await answered_again(q, way)
        await stopped(running)


async def test_a_redis_that_is_cut_off_is_a_503_and_both_sides_recover_by_themselves(redis_server):
    async with Way(redis_server.port) as way, in_redis(way.url, producer=BEATING) as q:
        [wait] = await q.producer.submit([job("a")])
        taken = await q.consumer.take(100)
        way.open.clear()
        q.redis.timeout = 0.5
        settling = asyncio.create_task(q.consumer.settle([done(taken[0], "kept")]))
        with pytest.raises(Unavailable, match="can't be reached"):
            await q.producer.submit([job("b")])
        with pytest.raises(Unavailable, match="can't be reached"):
            q.producer.submit([job("c")]).send(None)  # known to be away: refused at once
        way.open.set()
        q.redis.timeout = PATIENCE
        await asyncio.wait_for(settling, PATIENCE)
        assert (await asyncio.wait_for(wait, PATIENCE)).message == "kept"
        running = asyncio.create_task(answering(q.consumer))
        await answered_again(q, way)
        await stopped(running)


async def answered_again(q, way):
    """Once the way is good, also where commands that were given up on arrive late and take jobs to nobody."""
    way.delay, q.redis.timeout = 0.0, PATIENCE
    names = map("later {}".format, itertools.count())

    async def answered():
        name = next(names)
        try:
            [wait] = await q.producer.submit([job(name)])
        except Unavailable:  # a call that began while it was not good may end only now
            return False
        return (await asyncio.wait_for(wait, PATIENCE)).message == name

    for _ in range(3):
        await until(answered)
    await until(lambda: settled(q))


async def test_a_full_redis_refuses_new_jobs_answers_old_ones_and_recovers(own_redis):
    server = own_redis()
    async with in_redis(server.url, max_tokens=10**9, producer=BEATING, consumer={"idle": 0.3}) as q:
        [wait] = await q.producer.submit([job("a")])
        taken = await q.consumer.take(100)
        with server.client() as client:
            client.config_set("maxmemory", 1)
            with pytest.raises(Unavailable, match="Redis is full") as caught:
                await q.producer.submit([job("b", 5000)])
            assert caught.value.retry_after
            await asyncio.wait_for(q.consumer.settle([done(taken[0], "all the same")]), PATIENCE)
            assert (await asyncio.wait_for(wait, PATIENCE)).message == "all the same"
            client.pexpire(KEYS.alive(q.producer.replica), 60_000)
            await until(lambda: client.pttl(KEYS.alive(q.producer.replica)) > 60_000)  # both go on giving signs of life
            last = client.zscore(KEYS.workers, q.consumer.worker)
            await until(lambda: client.zscore(KEYS.workers, q.consumer.worker) > last)
            client.config_set("maxmemory", 0)
        await q.producer.submit([job("c")])
        assert ids(await q.consumer.take(100)) == ["c"]
        assert await q.tokens() == 10


async def test_a_frozen_redis_is_a_503_and_both_sides_recover_by_themselves(own_redis):
    server = own_redis()
    async with in_redis(server.url, producer=BEATING) as q:
        [wait] = await q.producer.submit([job("a")])
        taken = await q.consumer.take(100)
        server.signal(signal.SIGSTOP)
        q.redis.timeout = 0.5
        settling = asyncio.create_task(q.consumer.settle([done(taken[0], "kept")]))
        with pytest.raises(Unavailable, match="can't be reached"):
            await q.producer.submit([job("b")])
        with pytest.raises(Unavailable, match="can't be reached"):
            q.producer.submit([job("c")]).send(None)  # known to be away: refused at once
        q.redis.timeout = PATIENCE
        server.signal(signal.SIGCONT)
        await asyncio.wait_for(settling, PATIENCE)
        assert (await asyncio.wait_for(wait, PATIENCE)).message == "kept"
        await until(lambda: not q.producer.away)
        await q.producer.submit([job("d")])
        assert ids(await q.consumer.take(100)) == ["d"]


async def test_a_redis_that_was_killed_and_lost_its_last_second_loses_nobody_an_answer(own_redis):
    server = own_redis(appendonly="yes", appendfsync="everysec")
    async with in_redis(server.url, producer=BEATING) as q:
        running = asyncio.create_task(answering(q.consumer))
        waits = []
        for i in range(30):
            waits += await q.producer.submit([job(i)])
        await asyncio.sleep(1.2)
        for i in range(30, 40):
            waits += await q.producer.submit([job(i)])
        server.kill()
        await asyncio.sleep(0.2)
        server.start()
        answers = await asyncio.wait_for(asyncio.gather(*waits), PATIENCE)
        assert [o.message for o in answers] == [str(i) for i in range(40)]
        await until(lambda: settled(q))
        await stopped(running)


async def settled(q):
    return await q.tokens() == 0  # what was settled in the second that got lost is settled again


async def answering(worker):
    while True:
        await asyncio.sleep(0.05)
        batch = await worker.wanted(await worker.take(50))
        await worker.settle([done(j, j.id) for j in batch])


async def stopped(running):
    running.cancel()
    await asyncio.wait([running])
