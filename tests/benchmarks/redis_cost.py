"""What a pair costs Redis: processor time of the redis-server, commands, bytes on the wire, memory while it waits.

    python tests/benchmarks/redis_cost.py [--pairs 20000]

The queue's own code around a real redis-server, with a worker that answers at once. Processor time is the server's own,
so that a busy machine does not spoil it. Prints one JSON object a line; ``docs/scale.py`` is worked out from them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import uuid
from contextlib import AsyncExitStack
from pathlib import Path

import redis as redis_py

sys.path.insert(0, str(Path(__file__).parents[1]))
from inward.batching import pack
from inward.queues.redis.consumer import RedisConsumer
from inward.queues.redis.producer import RedisProducer
from inward.queues.single_flight import SingleFlight
from inward.stores.connection import Connection
from inward.stores.jobs import BulkStore
from inward.stores.keys import Keys
from inward.types import Group, HeadRef, Job, Scored, Scores, Timing, Usage
from support.queues import living
from support.redis_server import RedisServer

KEYS = Keys("cost")
TOKENS = 256
"""Of a pair: a prompt of 128 and two answers of 64."""
BUDGET = 8192
CALLERS = 64
"""At once, of one pair each; fewer where a request has more."""
HEADS = (HeadRef("legend", "legend", 1), HeadRef("hybrid", "hybrid", 1))


def pair() -> Job:
    ids = tuple(random.randrange(150_000) for _ in range(TOKENS))
    return Job(
        uuid.uuid4().hex,
        Group(ids[:128], (ids[128:192], ids[192:])),
        ("legend", "hybrid"),
        pair=True,
        deadline=2e9,
        enqueued=1e9,
    )


def scored(job: Job) -> Scored:
    about = {
        "margin": 1.2345678,
        "margin_scaled": 0.345678,
        "bin": 0.66667,
        "label_agrees": True,
        "confidence": 0.912345,
    }
    scores = Scores((random.random(), random.random()), probability_N=(random.random(), random.random()), pair=about)
    return Scored(job.id, HEADS, (scores, scores), "base", Usage(256, 128, 128), timing=Timing(0.001, 0.01))


class Meter:
    """The counters of a redis-server, and what they grew by."""

    def __init__(self, client: redis_py.Redis) -> None:
        self._client = client
        self._before = self._now()

    def _now(self) -> dict[str, float]:
        info = self._client.info()
        return {
            "cpu": info["used_cpu_user"] + info["used_cpu_sys"], "commands": info["total_commands_processed"],
            "in": info["total_net_input_bytes"], "out": info["total_net_output_bytes"], "memory": info["used_memory"],
        }  # fmt: skip

    def each(self, n: int) -> dict[str, float]:
        grown = {name: (now - self._before[name]) / n for name, now in self._now().items()}
        return {
            "cpu_us": round(1e6 * grown["cpu"], 1), "commands": round(grown["commands"], 1),
            "bytes_in": round(grown["in"]), "bytes_out": round(grown["out"]), "memory_bytes": round(grown["memory"]),
        }  # fmt: skip


async def working(worker: RedisConsumer) -> None:
    """As ``Worker`` does, without computing."""
    waiting: list[Job] = []
    while True:
        waiting = await worker.wanted(waiting + await worker.take(BUDGET))
        while waiting:
            batch, waiting = pack(waiting, BUDGET)
            await worker.settle([scored(job) for job in batch])


async def interactive(server: RedisServer, pairs: int, per_request: int) -> dict[str, float]:
    connection = Connection(server.url)
    sides = AsyncExitStack()
    await sides.enter_async_context(living(worker := RedisConsumer(connection, KEYS)))
    await sides.enter_async_context(living(producer := RedisProducer(connection, KEYS, max_tokens=2**40)))
    queue = SingleFlight(producer, window=5.0, current=lambda _: True)
    task = asyncio.create_task(working(worker))

    callers = max(2, CALLERS // per_request)
    requests = pairs // per_request // callers

    async def caller() -> None:
        for _ in range(requests):
            await asyncio.gather(*await queue.submit([pair() for _ in range(per_request)]))

    with server.client() as client:
        meter = Meter(client)
        await asyncio.gather(*(caller() for _ in range(callers)))
        found = meter.each(requests * callers * per_request)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await sides.aclose()
        await connection.close()
        client.flushall()
    return found


async def waiting(server: RedisServer, pairs: int) -> dict[str, float]:
    connection = Connection(server.url)
    sides = AsyncExitStack()
    await sides.enter_async_context(living(RedisConsumer(connection, KEYS)))
    await sides.enter_async_context(living(producer := RedisProducer(connection, KEYS, max_tokens=2**40)))
    with server.client() as client:
        meter = Meter(client)
        for _ in range(pairs // 64):
            await producer.submit([pair() for _ in range(64)])
        found = meter.each(pairs // 64 * 64)
        await sides.aclose()
        await connection.close()
        client.flushall()
    return found


async def bulk(server: RedisServer, pairs: int) -> dict[str, float]:
    """The store of bulk jobs alone; its rows go through the queue in requests of 64."""
    connection = Connection(server.url)
    store = BulkStore(connection, KEYS, keep=3600, idle=30)
    words = [f"{random.randrange(10**6):x}" for _ in range(5000)]

    def text(n: int) -> str:
        return " ".join(random.choices(words, k=n))

    rows = [json.dumps({"prompt": text(96), "chosen": text(48), "rejected": text(48)}) for _ in range(pairs // 64 * 64)]

    async def lines():
        for row in rows:
            yield row

    result = {
        "margin": 1.23,
        "chosen_score": 0.5,
        "rejected_score": -0.7,
        "confidence": 0.9,
        "head": "legend",
        "policy_version": "base",
    }
    with server.client() as client:
        meter = Meter(client)
        job = await store.create("margin", lines(), head="legend", scores="trainer")
        while (await store.get(job.id)).state == "running":
            if (chunk := await store.take("me")) is not None:
                results = [{"index": i, **result} for i in range(len(chunk.rows))]
                await store.finish(
                    chunk, results, [{**json.loads(r), **s} for r, s in zip(chunk.rows, results, strict=True)]
                )
        found = meter.each(len(rows)) | {"row_bytes": round(sum(map(len, rows)) / len(rows))}
        await connection.close()
        client.flushall()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=20_000)
    pairs = parser.parse_args().pairs
    with tempfile.TemporaryDirectory() as name:
        server = RedisServer(Path(name), appendonly="yes", appendfsync="everysec").start()
        try:
            for per_request in (1, 4, 64):
                found = asyncio.run(interactive(server, pairs, per_request))
                print(json.dumps({"pairs_per_request": per_request, **found}), flush=True)
            print(json.dumps({"what": "waiting", **asyncio.run(waiting(server, pairs))}), flush=True)
            print(json.dumps({"what": "bulk store", **asyncio.run(bulk(server, pairs))}), flush=True)
        finally:
            server.kill()


if __name__ == "__main__":
    main()
