"""Both sides of a queue in one hand, in memory or in Redis, and jobs to send through it."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

from inward.queues.memory import MemoryQueue
from inward.queues.redis.consumer import RedisConsumer
from inward.queues.redis.producer import RedisProducer
from inward.stores.connection import Connection
from inward.stores.keys import GROUP, Keys
from inward.types import Failed, Group, Job
from support.waiting import PATIENCE

KEYS = Keys("test")
WORKER = {"idle": PATIENCE, "ttl": PATIENCE}
REPLICA = {"beat": PATIENCE, "ttl": PATIENCE}
"""Nothing happens by itself, and nobody counts as dead because the machine is slow."""
BEATING = {"beat": 0.05}
"""For a replica that is to notice what happens in Redis."""


class InMemory:
    """The queue in the process, as the contract looks at it."""

    def __init__(self, max_tokens):
        self.producer = self.consumer = MemoryQueue(max_tokens=max_tokens)

    async def tokens(self):
        return self.producer.tokens


class InRedis:
    """One replica and one worker around a Redis."""

    def __init__(self, producer, consumer, connection, keys):
        self.producer, self.consumer, self.redis, self._keys = producer, consumer, connection, keys

    async def tokens(self):
        return int(await self.redis("GET", self._keys.key("tokens")) or 0)


@asynccontextmanager
async def in_redis(url, **options):
    """Opened sides of a queue in Redis, closed in the end; options as for ``around``."""
    connection = Connection(url, timeout=PATIENCE)
    try:
        async with around(connection, KEYS, **options) as both:
            yield both
    finally:
        await connection.close()


@asynccontextmanager
async def around(connection, keys, *, max_tokens=1_000_000, producer=None, consumer=None):
    """Opened sides of a queue, which leave in the end; the options go to their constructors."""
    worker = RedisConsumer(connection, keys, **{**WORKER, **(consumer or {})})
    replica = RedisProducer(connection, keys, max_tokens=max_tokens, **{**REPLICA, **(producer or {})})
    async with living(worker), living(replica):
        yield InRedis(replica, worker, connection, keys)


@asynccontextmanager
async def living(side):
    """One side of the queue in Redis with its loops, as a process runs them; it leaves in the end."""
    if isinstance(side, RedisConsumer):
        await side.open()
        loops = [side.keep]
    else:
        await side.live()
        loops = [side.keep_living, side.keep_receiving]
    tasks = [asyncio.create_task(loop()) for loop in loops]
    side.stop = lambda: [task.cancel() for task in tasks]  # as if it were frozen or dead
    try:
        yield side
    finally:
        side.stop()
        await asyncio.gather(*tasks, return_exceptions=True)
        await side.leave()


def age(server, worker, seconds=PATIENCE, *, streams=KEYS.streams, group=GROUP):
    """As if the worker of that name had not renewed its claims for so long."""
    more = round(1000 * seconds)
    with server.client() as client:
        for stream in streams:
            for claim in client.xpending_range(stream, group, "-", "+", 10_000, consumername=worker):
                since, deliveries = claim["time_since_delivered"], claim["times_delivered"]
                client.xclaim(
                    stream,
                    group,
                    worker,
                    since,
                    [claim["message_id"]],
                    idle=since + more,
                    retrycount=deliveries,
                    justid=True,
                )


def endless(client):
    """Keys that would stay for ever if everybody went away now."""
    return sorted(key for key in client.scan_iter() if client.ttl(key) == -1)


def job(name, tokens=10, **more):
    return Job(str(name), Group((1,) * tokens), ("h",), **more)


def done(j, message=""):
    return Failed(j.id, "x", message)


def ids(jobs):
    return [j.id for j in jobs]
