"""What a storm of retries costs: the same items again and again, at several replicas and at one.

Each replica computes identical items once, and knows nothing of the others; so the difference between the two is the
most that an agreement between replicas could save.

    python tests/benchmarks/retry_storm.py [--rounds 3]

The queue's own code around a real redis-server, in one process, with a worker whose device takes a fixed time for a
token. Callers *leave* when they send again (a client's timeout) or *stay* (a hedging client). Beside the storm: callers
whose items are all different. Prints one JSON object a line, ways alternating.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from redis_cost import Meter, pair, scored

from inward.batching import pack
from inward.queues.redis.consumer import RedisConsumer
from inward.queues.redis.producer import RedisProducer
from inward.queues.single_flight import SingleFlight
from inward.stores.connection import Connection
from inward.stores.keys import Keys
from inward.types import Job
from support.queues import living
from support.redis_server import RedisServer

KEYS = Keys("storm")
ITEMS, SENT = 200, 5
TOKENS_PER_S = 25_600.0
"""Of the device: all items once take two seconds."""
GAP_S = 0.5
"""Between two sendings of the same items."""
BUDGET = 4096
REPLICAS = (4, 1)


class House:
    """Replicas around a Redis, and one worker whose device takes its time."""

    def __init__(self, url: str, stack: AsyncExitStack) -> None:
        self._url, self._stack = url, stack
        self.replicas: list[SingleFlight] = []
        self.computed = 0

    async def connection(self) -> Connection:
        connection = Connection(self._url)
        self._stack.push_async_callback(connection.close)
        return connection

    async def open(self, replicas: int) -> House:
        worker = await self._stack.enter_async_context(living(RedisConsumer(await self.connection(), KEYS)))
        for _ in range(replicas):
            connection = await self.connection()
            producer = RedisProducer(connection, KEYS, max_tokens=2**40)
            await self._stack.enter_async_context(living(producer))
            self.replicas.append(SingleFlight(producer, window=5.0, current=lambda _: True))
        working = asyncio.create_task(self._work(worker))
        self._stack.push_async_callback(stopped, working)
        return self

    async def _work(self, worker: RedisConsumer) -> None:
        waiting: list[Job] = []
        while True:
            waiting = await worker.wanted(waiting + ([] if waiting else await worker.take(BUDGET)))
            batch, waiting = pack(waiting, BUDGET)
            if batch:
                self.computed += len(batch)
                await asyncio.sleep(sum(job.group.tokens for job in batch) / TOKENS_PER_S)
                await worker.settle([scored(job) for job in batch])


async def stopped(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def storm(server: RedisServer, replicas: int, *, leave: bool) -> dict[str, object]:
    """Items computed, and seconds until the last sending is answered."""
    items = [pair() for _ in range(ITEMS)]
    async with AsyncExitStack() as stack:
        api = await House(server.url, stack).open(replicas)
        with server.client() as client:
            meter, began = Meter(client), time.perf_counter()

            async def send(i: int) -> None:
                await asyncio.sleep(i * GAP_S)
                replica = api.replicas[i % replicas]
                jobs = [replace(item, id=uuid.uuid4().hex) for item in items]
                answers = asyncio.gather(*await replica.submit(jobs))
                patience = GAP_S if leave and i < SENT - 1 else None
                done, _ = await asyncio.wait({answers}, timeout=patience)
                if not done:
                    answers.cancel()
                    await asyncio.gather(answers, return_exceptions=True)
                    await replica.abandon([job.id for job in jobs])

            await asyncio.gather(*map(send, range(SENT)))
            seconds = time.perf_counter() - began
            used = meter.each(1)
            computed = api.computed
        await asyncio.sleep(0.1)
    return {"computed_items": computed, "seconds": round(seconds, 2), "redis_cpu_ms": round(used["cpu_us"] / 1000, 1)}


async def different(server: RedisServer, replicas: int, seconds: float = 4.0) -> dict[str, object]:
    """Nobody sends anything twice: milliseconds of a lonely caller, then items/s of 32 callers with 4 items each."""
    async with AsyncExitStack() as stack:
        api = await House(server.url, stack).open(replicas)
        global TOKENS_PER_S
        before, TOKENS_PER_S = TOKENS_PER_S, 1e12
        try:
            times = []
            for _ in range(200):
                began = time.perf_counter()
                await asyncio.gather(*await api.replicas[0].submit([pair()]))
                times.append(1000 * (time.perf_counter() - began))
            done, end = 0, time.perf_counter() + seconds
            batches = [[pair() for _ in range(4)] for _ in range(256)]

            async def call(replica: SingleFlight) -> None:
                nonlocal done
                while time.perf_counter() < end:
                    await asyncio.gather(*await replica.submit(fresh(random.choice(batches))))
                    done += 4

            with server.client() as client:
                meter, cpu = Meter(client), time.process_time()
                await asyncio.gather(*(call(api.replicas[i % replicas]) for i in range(32)))
                used, cpu = meter.each(done), time.process_time() - cpu
        finally:
            TOKENS_PER_S = before
    return {
        "p50_ms": round(statistics.median(times[20:]), 2), "items_per_s": round(done / seconds),
        "own_cpu_us_per_item": round(1e6 * cpu / done, 1),
        "redis_cpu_us_per_item": used["cpu_us"], "redis_bytes_in_per_item": used["bytes_in"],
    }  # fmt: skip


def fresh(jobs: Sequence[Job]) -> list[Job]:
    """The same work under another content, without drawing new ids one by one."""
    mark = random.randrange(150_000), random.randrange(150_000)
    return [
        replace(job, id=uuid.uuid4().hex, group=replace(job.group, prompt_ids=(*job.group.prompt_ids[:-2], *mark)))
        for job in jobs
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        server = RedisServer(Path(name)).start()
        try:
            for _ in range(rounds):
                for replicas in REPLICAS:
                    for leave in (True, False):
                        found = asyncio.run(storm(server, replicas, leave=leave))
                        print(
                            json.dumps({"storm": "leave" if leave else "stay", "replicas": replicas, **found}),
                            flush=True,
                        )
                    found = asyncio.run(different(server, replicas))
                    print(json.dumps({"storm": None, "replicas": replicas, **found}), flush=True)
                    with server.client() as client:
                        client.flushall()
        finally:
            server.kill()


if __name__ == "__main__":
    main()
