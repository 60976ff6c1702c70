"""A billion pairs a day in a simulation: the real queue and real redis-servers, with workers whose time is not the
wall's.

    python tests/benchmarks/simulated_scale.py flow --shards 1 2 3 4     busy share of each Redis, 1,000 workers
    python tests/benchmarks/simulated_scale.py lost --rate 20            a shard is killed, and one is frozen
    python tests/benchmarks/simulated_scale.py told                      what a piece of a streamed answer costs

In ``flow`` every pair is submitted, taken, settled and received by the code that the service runs, in ticks of a
virtual clock: arrivals at random, a worker busy for as long as its tokens take. What Redis spent
is its own processor time (``INFO``), over the virtual seconds: so one core is enough to say what a thousand workers do
to it. An idle worker is woken by an arrival as Redis wakes one that blocks. ``lost`` runs in real time.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import itertools
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from redis_cost import BUDGET, KEYS, TOKENS, Meter, pair, scored

from inward.errors import Unavailable
from inward.queues.redis.consumer import RedisConsumer
from inward.queues.redis.producer import RedisProducer
from inward.queues.redis.sharded import ShardedConsumer, ShardedProducer, shards_of
from inward.stores.connection import Connection
from inward.types import Failed, Job, Piece
from support.queues import living
from support.redis_server import RedisServer

RATE = 1e9 / 86400
"""Pairs a second."""
BUSY = 0.7
"""Of the workers: their tokens/s follow from it."""
TICK_S = 0.005
"""What is due within one reaches Redis together, as it does where a thousand processes send to it."""
LONG = 3600.0
"""Nobody counts as gone: the wall's clock runs on while the virtual one stands."""


@asynccontextmanager
async def servers(n: int):
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for i in range(n):
            (where := Path(folder) / str(i)).mkdir()
            # what Redis does by the wall's clock is next to nothing a second, and would count many times over here
            started.append(RedisServer(where, appendonly="yes", hz="1", appendfsync="no").start())
        try:
            yield started
        finally:
            for server in started:
                server.signal(signal.SIGCONT)
                server.kill()


class Flow:
    """Replicas, workers and the events between them, by the virtual clock."""

    def __init__(self, connections: Sequence[Connection], workers: int, replicas: int) -> None:
        self.now, self.n = 0.0, len(connections)
        options = {"ttl": LONG, "clock": lambda: self.now}
        self.workers = [ShardedConsumer(connections, KEYS, idle=LONG, wait=0, **options) for _ in range(workers)]
        self.replicas = [ShardedProducer(connections, KEYS, max_tokens=2**40, **options) for _ in range(replicas)]
        self.by_name = {shard.replica: shard for replica in self.replicas for shard in replica.shards}
        self.tokens_s = RATE * TOKENS / workers / BUSY
        self.idle = deque(self.workers)
        self.events: list[tuple[float, int, object, list[Job]]] = []
        self.numbers = itertools.count()
        self.waited: list[float] = []
        self.arrived: dict[str, float] = {}
        self.taken: Counter[int] = Counter()

    def at(self, when: float, what: object, jobs: list[Job]) -> None:
        heapq.heappush(self.events, (when, next(self.numbers), what, jobs))

    async def open(self) -> None:
        for worker in self.workers:
            for shard in worker.shards:
                await shard.open()
                self.now = -random.random()  # what it does once a second it shall not do when all others do
                await shard.look(1)
                shard._forgetful = False
        self.now = 0.0
        for replica in self.replicas:
            await replica.live()
        self.at(0.0, "arrival", [])
        for one in (*self.workers, *self.replicas):
            self.at(random.random(), ("beat", one), [])

    async def run(self, until: float) -> None:
        while self.now < until:
            self.now += TICK_S
            due = []
            while self.events[0][0] <= self.now:
                when, _, what, jobs = heapq.heappop(self.events)
                if what == "arrival":
                    self.at(when + random.expovariate(RATE), "arrival", [])
                    due.append(self.arrival())
                elif isinstance(what, tuple):
                    due.append(self.beat(what[1]))
                else:
                    due.append(self.done(what, jobs))
            await asyncio.gather(*due)

    async def arrival(self) -> None:
        job = pair()
        self.arrived[job.id] = self.now
        await random.choice(self.replicas).submit([job])
        if self.idle:
            await self.begin(self.idle.popleft(), shards_of(job.group.prompt_ids, self.n)[:1], tokens=1)

    async def beat(self, one: ShardedConsumer | ShardedProducer) -> None:
        """As often as with a presence of ten seconds."""
        self.at(self.now + (1.0 if isinstance(one, ShardedProducer) else 10 / 3), ("beat", one), [])
        for shard in one.shards:
            await shard.live()

    async def begin(self, worker: ShardedConsumer, shards: Sequence[int], tokens: int = BUDGET) -> None:
        jobs = [job for s in shards for job in await worker.shards[s].look(max(1, tokens // self.n))]
        jobs = await worker.wanted(jobs) if jobs else []
        if not jobs:
            for shard in worker.shards:
                shard._forgetful = False  # where time passes by waiting it would still wait, and have missed nothing
            self.idle.append(worker)
            return
        self.taken[len(jobs)] += 1
        self.waited += [self.now - self.arrived.pop(job.id) for job in jobs]
        self.at(self.now + sum(job.group.tokens for job in jobs) / self.tokens_s, worker, jobs)

    async def done(self, worker: ShardedConsumer, jobs: list[Job]) -> None:
        await worker.settle([scored(job) for job in jobs])
        for name in {job.reply_to for job in jobs}:
            await self.by_name[name].receive()
        await self.begin(worker, range(self.n))


async def flow(shards: int, workers: int, replicas: int, seconds: float) -> dict[str, object]:
    async with servers(shards) as started:
        connections = [Connection(server.url, timeout=60) for server in started]
        world = Flow(connections, workers, replicas)
        await world.open()
        await world.run(seconds / 4)  # until batches are as they will be
        pairs, began, wall = len(world.waited), world.now, time.monotonic()
        world.taken.clear()
        with Meters(started) as meters:
            await world.run(began + seconds)
            pairs, virtual = len(world.waited) - pairs, world.now - began
            busy = [meter.each(1)["cpu_us"] / 1e6 / virtual for meter in meters]
            commands = sum(meter.each(pairs)["commands"] for meter in meters)
        waited = sorted(world.waited[-pairs:])
        for connection in connections:
            await connection.close()
    return {
        "shards": shards, "workers": workers, "pairs": pairs, "virtual_s": round(virtual, 2),
        "busy": [round(share, 3) for share in busy], "busy_sum": round(sum(busy), 3),
        "cpu_us_a_pair": round(1e6 * sum(busy) * virtual / pairs, 1), "commands_a_pair": round(commands, 1),
        "jobs_a_batch": round(sum(k * n for k, n in world.taken.items()) / sum(world.taken.values()), 2),
        "waited_p99_ms": round(1000 * waited[int(0.99 * pairs)], 1), "wall_s": round(time.monotonic() - wall, 1),
    }  # fmt: skip


class Meters:
    """A meter for each server, while their clients are open."""

    def __init__(self, started: Sequence[RedisServer]) -> None:
        self._clients = [server.client() for server in started]

    def __enter__(self) -> list[Meter]:
        return [Meter(client) for client in self._clients]

    def __exit__(self, *_: object) -> None:
        for client in self._clients:
            client.close()


async def lost(how: str, rate: float, away_s: float) -> dict[str, object]:
    """Three shards; the last is away for a while. Real time, twelve workers, everything at its defaults."""
    async with servers(3) as started, AsyncExitStack() as stack:
        connections = [Connection(server.url) for server in started]
        for connection in connections:
            stack.push_async_callback(connection.close)
        workers = [ShardedConsumer(connections, KEYS) for _ in range(12)]
        replica = ShardedProducer(connections, KEYS, max_tokens=2**40)
        loops = [replica.keep_living, replica.keep_receiving, *(worker.keep for worker in workers)]

        async def work(worker: ShardedConsumer) -> None:
            while True:
                jobs = await worker.wanted(await worker.take(BUDGET))
                await asyncio.sleep(0.02)
                await worker.settle([scored(job) for job in jobs])

        tasks = [asyncio.create_task(loop()) for loop in loops]
        while not all(shard.workers == len(workers) for shard in replica.shards):
            await asyncio.sleep(0.1)
        tasks += [asyncio.create_task(work(worker)) for worker in workers]
        told: list[tuple[float, float, int, str]] = []
        calls: set[asyncio.Task[None]] = set()

        async def call() -> None:
            job, sent = replace(pair(), deadline=time.time() + 95), time.monotonic()
            try:
                outcome = await (await replica.submit([job]))[0]
                said = outcome.code if isinstance(outcome, Failed) else "scored"
            except Unavailable as error:
                said = error.code
            told.append((sent, time.monotonic(), shards_of(job.group.prompt_ids, 3)[0], said))

        async def load(seconds: float) -> None:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                calls.add(asyncio.create_task(call()))
                await asyncio.sleep(random.expovariate(rate))

        await load(3)
        started[2].kill() if how == "killed" else started[2].signal(signal.SIGSTOP)
        went = time.monotonic()
        await load(away_s)
        back = time.monotonic()
        started[2].start() if how == "killed" else started[2].signal(signal.SIGCONT)
        await load(8)
        await asyncio.wait(calls, timeout=30)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with suppress(Unavailable):
            await asyncio.gather(replica.leave(), *(worker.leave() for worker in workers))
    ends = sorted(end for _, end, shard, said in told if shard < 2 and went - 2 <= end <= back)
    moved = [end - sent for sent, end, shard, said in told if shard == 2 and said == "scored" and went < sent < back]
    failed = [(sent, end) for sent, end, shard, said in told if shard == 2 and said != "scored"]
    again = [end for sent, end, shard, said in told if shard == 2 and said == "scored" and sent > back]
    others = Counter(said for sent, _, shard, said in told if shard < 2)
    return {
        "lost": how, "pairs_s": rate, "away_s": round(back - went, 1), "others": dict(others),
        "longest_pause_of_the_others_s": round(max(b - a for a, b in itertools.pairwise(ends)), 2),
        "failed": len(failed), "of_those_on_their_way": sum(sent < went for sent, _ in failed),
        "failed_within_s_longest": round(max((end - sent for sent, end in failed), default=0.0), 2),
        "scored_by_others": len(moved), "of_those_within_s_median": round(sorted(moved)[len(moved) // 2], 3),
        "of_those_within_s_longest": round(max(moved), 2),
        "scored_again_after_s": round(min(again) - back, 2), "unanswered": len(calls) - len(told),
    }  # fmt: skip


async def told(answers: int, pieces: int) -> dict[str, object]:
    """One after the other, as a worker tells while it draws; the replica reads each as it comes."""
    async with servers(1) as (server,):
        connection = Connection(server.url)
        options = {"idle": LONG, "ttl": LONG}
        worker, replica = RedisConsumer(connection, KEYS, **options), RedisProducer(
            connection, KEYS, max_tokens=2**40, ttl=LONG, beat=LONG
        )  # fmt: skip
        heard = 0

        def hear(_: Piece) -> None:
            nonlocal heard
            heard += 1

        async with living(worker), living(replica):
            with server.client() as client:
                spent = {"cpu_us": 0.0, "commands": 0.0, "bytes_in": 0.0, "bytes_out": 0.0}
                for _ in range(answers):
                    await replica.submit([replace(pair(), told=True)], hear)
                    [job] = await worker.take(BUDGET)
                    meter, before = Meter(client), heard
                    for k in range(pieces):
                        await worker.tell(Piece(job.id, 5 * k, " word"))
                        while heard < before + k + 1:
                            await asyncio.sleep(0)
                    found = meter.each(pieces)
                    spent = {name: spent[name] + found[name] / answers for name in spent}
                    await worker.settle([scored(job)])
        await connection.close()
    return {"told": answers, "pieces": heard, **{name: round(value, 1) for name, value in spent.items()}}


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("flow", "lost", "told"))
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--replicas", type=int, default=34)
    parser.add_argument("--seconds", type=float, default=1.0, help="virtual ones (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=60.0, help="of lost: pairs/s (default: %(default)s)")
    args = parser.parse_args()
    random.seed(0)
    if args.what == "flow":
        for shards in args.shards:
            print(json.dumps(await flow(shards, args.workers, args.replicas, args.seconds)), flush=True)
    elif args.what == "lost":
        for how in ("killed", "frozen"):
            print(json.dumps(await lost(how, args.rate, 15.0)), flush=True)
    else:
        print(json.dumps(await told(100, 64)), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
