"""What Redis between API and worker costs: latency of one caller, and requests/s with several replicas and workers.

    python tests/benchmarks/queue_overhead.py [--seconds 5]
    python tests/benchmarks/queue_overhead.py --demo [--seconds 30] [--rounds 3]

With the fake backbone nothing but the way is measured; with ``--demo`` one worker with the demonstration backbone,
through Redis and in one process, alternating. Prints one JSON object a line, in the end of ``--demo`` the ratio of the
medians. Needs a redis-server (the dev extra has one).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.fleet import Fleet, Process
from support.redis_server import RedisServer
from support.serving import write_model

NUMBER = itertools.count()


ANSWER = " ".join(
    ["I would not do that, since somebody may be hurt, and there are better ways to spend an evening."] * 4
)


def pair(words: str = "") -> dict[str, str]:
    n = next(NUMBER)  # never the same twice: identical items would be computed once
    return {"prompt": f"question {n} {words}", "chosen": f"answer {n} {words}", "rejected": f"no {n} {words}"}


async def latency(url: str, requests: int = 400) -> dict[str, float]:
    """Milliseconds of one caller that sends one pair after the other."""
    times = []
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        for _ in range(requests):
            began = time.perf_counter()
            answer = await client.post("/margin", json={"pairs": [pair()]})
            times.append(1000 * (time.perf_counter() - began))
            assert answer.status_code == 200, answer.text
    p50, p99 = np.percentile(times[20:], (50, 99))
    return {"p50_ms": round(float(p50), 2), "p99_ms": round(float(p99), 2)}


async def throughput(urls: list[str], seconds: float, callers: int = 32, words: str = "") -> dict[str, float]:
    """Pairs/s of callers that each send four pairs, again and again."""
    done = 0
    end = time.perf_counter() + seconds

    async def call(client: httpx.AsyncClient, url: str) -> None:
        nonlocal done
        while time.perf_counter() < end:
            answer = await client.post(url + "/margin", json={"pairs": [pair(words) for _ in range(4)]})
            assert answer.status_code == 200, answer.text
            done += 4

    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None)) as client:
        await asyncio.gather(*(call(client, urls[i % len(urls)]) for i in range(callers)))
    return {"pairs_per_second": round(done / seconds, 1)}


def measure(name: str, urls: list[str], seconds: float) -> None:
    row = {
        "way": name,
        "cores": os.cpu_count(),
        **asyncio.run(latency(urls[0])),
        **asyncio.run(throughput(urls, seconds)),
    }
    print(json.dumps(row), flush=True)


def with_demo(folder: Path, redis: RedisServer, seconds: float, rounds: int) -> None:
    """One worker with a real model, in one process and through Redis; both are there all the time, and one works at
    a time."""
    os.environ["XDG_STATE_HOME"] = str(folder)
    with Fleet(folder, redis.url, demo=True, backbone="transformers", sharing_window=5) as fleet:
        alone, api, worker = fleet.serve(), fleet.api(), fleet.worker()
        fleet.wait_until_ready(alone, worker, api)
        ways = {"one process, queue in memory": alone.url, "1 api, 1 worker, Redis": api.url}
        found: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, url in ways.items():
                row = asyncio.run(throughput([url], seconds, words=ANSWER))
                found[name].append(row["pairs_per_second"])
                print(json.dumps({"way": name, "backbone": "demo", "cores": os.cpu_count(), **row}), flush=True)
        memory, through = (statistics.median(rates) for rates in found.values())
    print(json.dumps({"redis_against_memory": round(through / memory, 3)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement of throughput")
    parser.add_argument(
        "--demo",
        action="store_true",
        help="one worker with the demonstration backbone, through Redis and in one process",
    )
    parser.add_argument("--rounds", type=int, default=3, help="of --demo")
    args = parser.parse_args()
    seconds = args.seconds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder)
        redis = RedisServer(folder).start()
        try:
            if args.demo:
                with_demo(folder, redis, seconds, args.rounds)
                return
            with Fleet(folder, redis.url, sharing_window=5) as fleet:
                alone = fleet.serve()
                fleet.wait_until_ready(alone)
                measure("one process, queue in memory", [alone.url], seconds)
                alone.kill()
                apis: list[Process] = []
                workers: list[Process] = []
                for replicas, shops in ((1, 1), (2, 1), (1, 2), (2, 2), (4, 4)):
                    apis += [fleet.api() for _ in range(replicas - len(apis))]
                    workers += [fleet.worker() for _ in range(shops - len(workers))]
                    while len(apis) > replicas:
                        apis.pop().stop()
                    while len(workers) > shops:
                        workers.pop().stop()
                    fleet.wait_until_ready(*workers, *apis)
                    measure(f"{replicas} api, {shops} worker, Redis", [api.url for api in apis], seconds)
        finally:
            redis.kill()


if __name__ == "__main__":
    main()
