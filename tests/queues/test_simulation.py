"""Hours of bursts, deaths, freezes and losses in seconds: the real queue code and a real Redis, on a clock that is not
the wall's.

Time passes by ageing what Redis dates (claims, signs of life) and by the clock that is handed to the queue. Nothing
runs by itself: renewals, signs of life and reads happen when the simulation says so.
"""

import asyncio
import itertools

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inward.batching import pack
from inward.errors import EngineDead, InternalError, Overloaded
from inward.queues.redis.consumer import RedisConsumer
from inward.queues.redis.producer import RedisProducer
from inward.stores.connection import Connection
from inward.stores.keys import GROUP
from inward.types import Failed, HeadRef, Scored, Scores, Usage
from support.queues import KEYS, job
from support.waiting import PATIENCE

IDLE, TTL, STEP = 30.0, 10.0, 3.0
BATCH = 50


AGE = """
-- KEYS: both job streams, workers, all keys.  ARGV: group, milliseconds.
local ms = tonumber(ARGV[2])
for s = 1, 2 do
  if redis.call('EXISTS', KEYS[s]) == 1 then
    for _, p in ipairs(redis.call('XPENDING', KEYS[s], ARGV[1], '-', '+', 10000)) do
      redis.call('XCLAIM', KEYS[s], ARGV[1], p[2], 0, p[1], 'IDLE', p[3] + ms, 'RETRYCOUNT', p[4], 'JUSTID')
    end
  end
end
for _, worker in ipairs(redis.call('ZRANGE', KEYS[3], 0, -1)) do redis.call('ZINCRBY', KEYS[3], -ms, worker) end
for i = 4, #KEYS do
  local ttl = redis.call('PTTL', KEYS[i])
  if ttl > 0 then redis.call('PEXPIRE', KEYS[i], math.max(1, ttl - ms)) end
end
"""


class Worker:
    """A consumer and what it has taken; it computes when it is told to."""

    def __init__(self, world):
        self.consumer = RedisConsumer(
            world.redis, KEYS, idle=IDLE, ttl=TTL, wait=0, max_deliveries=world.max_deliveries, clock=world.clock
        )  # time does not pass by waiting
        self.waiting, self.frozen = [], False


class Replica:
    """A producer, and the futures of its jobs, each of which takes one answer and no second."""

    def __init__(self, world):
        self.producer = RedisProducer(world.redis, KEYS, max_tokens=world.max_tokens, ttl=TTL, clock=world.clock)
        self.futures, self.frozen = {}, False


class World:
    def __init__(self, url, *, max_deliveries, max_tokens=2000):
        self.redis = Connection(url, timeout=PATIENCE)
        self.max_deliveries, self.max_tokens = max_deliveries, max_tokens
        self.now = 1000.0
        self.workers, self.replicas = [], []
        self.names = itertools.count()
        self.computed = []

    def clock(self):
        return self.now

    async def pass_time(self, seconds):
        for _ in range(int(seconds // STEP)):
            self.now += STEP
            await self.age(round(STEP * 1000))
            for worker in self.workers:
                if not worker.frozen:
                    await worker.consumer.live()
            for replica in self.replicas:
                if not replica.frozen:
                    await replica.producer.live()
                    await replica.producer.receive()

    async def age(self, ms):
        keys = [*KEYS.streams, KEYS.workers, *sorted(await self.redis("KEYS", KEYS.key("*")))]
        await self.redis.script(AGE, keys, [GROUP, ms])

    async def submit(self, replica, n, *, poison=False):
        name = "poison" if poison else "job"
        jobs = [
            job(f"{name}-{next(self.names)}", 1 + i % 9, priority=("interactive", "bulk")[i % 3 == 2]) for i in range(n)
        ]
        try:
            for one, future in zip(jobs, await replica.producer.submit(jobs), strict=True):
                replica.futures[one.id] = future
        except (Overloaded, EngineDead):
            pass

    async def abandon(self, replica):
        names = [name for name, future in replica.futures.items() if not future.done()][::2]
        for name in names:
            del replica.futures[name]
        await replica.producer.abandon(names)

    async def work(self, worker):
        """Takes what is there and computes one batch; dies of poison. Whether there was anything."""
        worker.waiting += await worker.consumer.look(BATCH)
        worker.waiting = await worker.consumer.wanted(worker.waiting)
        batch, rest = pack(worker.waiting, BATCH)
        if not batch:
            return False
        if any(one.id.startswith("poison") for one in batch):
            self.workers.remove(worker)
            return True
        self.computed += [one.id for one in batch]
        await worker.consumer.settle(
            [Scored(one.id, (HeadRef("h", "legend", 1),), (Scores((1.0,)),), "base", Usage()) for one in batch]
        )
        worker.waiting = rest
        return True

    async def settle_down(self):
        """Nobody is frozen any more; until nothing is left to do."""
        for one in (*self.workers, *self.replicas):
            one.frozen = False
        for _ in range(120):
            if not self.workers:
                await self.spawn()
            for worker in list(self.workers):
                while worker in self.workers and await self.work(worker):
                    pass
            await self.pass_time(2 * STEP)
            if await self.empty():
                return
        raise AssertionError("it does not settle down")

    async def spawn(self):
        self.workers.append(Worker(self))
        await self.workers[-1].consumer.open()

    async def empty(self):
        return not any([await self.redis("XLEN", stream) for stream in KEYS.streams]) and all(
            future.done() for replica in self.replicas for future in replica.futures.values()
        )

    async def check(self):
        for stream in KEYS.streams:
            assert (await self.redis("XPENDING", stream, GROUP))["pending"] == 0
        assert await self.redis("EXISTS", KEYS.key("open"), KEYS.key("tokens")) == 0
        for replica in self.replicas:
            for name, future in replica.futures.items():
                outcome = future.result()
                if name.startswith("poison"):
                    assert (type(outcome), outcome.code) == (Failed, InternalError.code)
                else:
                    assert isinstance(outcome, Scored), (name, outcome)
            assert replica.producer.open_jobs == 0


OPERATIONS = (
    "submit", "submit", "work", "work", "work", "abandon", "spawn", "kill", "freeze", "thaw", "cut", "new replica",
    "lose replica", "freeze replica", "seconds", "minute", "redis forgets",
)  # fmt: skip
programs = st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 99)), min_size=10, max_size=60)
quiet = settings(max_examples=15, suppress_health_check=list(HealthCheck))


async def run(url, program, max_deliveries):
    world = World(url, max_deliveries=max_deliveries)
    await world.redis("FLUSHALL")
    try:
        await world.spawn()
        world.replicas.append(Replica(world))
        await world.replicas[0].producer.live()
        for operation, number in program:
            await do(world, operation, number)
        await world.settle_down()
        await world.check()
        return world
    finally:
        await world.redis.close()


async def do(world, operation, number):
    worker = world.workers[number % len(world.workers)] if world.workers else None
    replica = world.replicas[number % len(world.replicas)]
    match operation:
        case "submit":
            await world.submit(replica, 1 + number % 40)
        case "poison":
            await world.submit(replica, 1, poison=True)
        case "work" if worker is not None and not worker.frozen:
            await world.work(worker)
        case "abandon":
            await world.abandon(replica)
        case "spawn" if len(world.workers) < 4:
            await world.spawn()
        case "kill" if worker is not None:
            world.workers.remove(worker)
        case "freeze" if worker is not None:
            worker.frozen = True
        case "thaw" if worker is not None:
            worker.frozen = False
        case "cut" if worker is not None:  # Redis gave it jobs, and the answer got lost
            await world.redis(
                "XREADGROUP", "GROUP", GROUP, worker.consumer.worker, "COUNT", 5, "STREAMS", KEYS.streams[0], ">"
            )
        case "new replica" if len(world.replicas) < 3:
            world.replicas.append(Replica(world))
            await world.replicas[-1].producer.live()
        case "lose replica" if len(world.replicas) > 1:
            world.replicas.remove(replica)
        case "freeze replica":
            replica.frozen = not replica.frozen
        case "seconds":
            await world.pass_time(5 * STEP)
        case "minute":
            await world.pass_time(60)
        case "redis forgets":
            await world.redis("FLUSHALL")
            await Worker(world).consumer.open()


@quiet
@given(program=programs)
def test_whatever_dies_freezes_or_is_lost_everybody_is_answered_exactly_once(redis_server, program):
    asyncio.run(run(redis_server.url, program, max_deliveries=10_000))


poisoned = st.lists(
    st.tuples(
        st.sampled_from(("submit", "submit", "poison", "work", "work", "work", "spawn", "seconds", "minute")),
        st.integers(0, 99),
    ),
    min_size=10,
    max_size=40,
)


@quiet
@given(program=poisoned)
def test_poison_becomes_a_dead_letter_and_nobody_else_does(redis_server, program):
    world = asyncio.run(run(redis_server.url, program, max_deliveries=3))
    with redis_server.client() as client:
        letters = {fields[b"id"].decode() for _, fields in client.xrange(KEYS.dead)}
    sent = {name for replica in world.replicas for name in replica.futures if name.startswith("poison")}
    assert letters == sent
