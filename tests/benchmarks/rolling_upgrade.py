"""A rolling upgrade, and the way back: replicas and workers of two trees around one Redis, under load.

    git worktree add /tmp/former v0.1.0
    python tests/benchmarks/rolling_upgrade.py /tmp/former [--seconds 20]

One API replica of each tree answers callers all the time. The former workers are replaced by ours: one is told to stop,
the other is killed. Then a former one takes over from ours, of which one is told to stop and one is killed. Prints the
answers by replica and status after each step, and ends with 1 if one was no 200, or a job became a dead letter. The
backbone is a fake one: what is tried is what processes say to each other.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / part) for part in ("service", "clients/python", "clients/trainer", "tests")]

from inward.stores.keys import Keys  # noqa: E402
from support.fleet import Fleet, Process  # noqa: E402
from support.redis_server import RedisServer  # noqa: E402
from support.serving import write_model  # noqa: E402
from support.waiting import PATIENCE  # noqa: E402

CALLERS, PAIRS = 8, 8
SECONDS_PER_TOKEN = 1e-4


class Two:
    """Processes of two trees in one fleet."""

    def __init__(self, fleet: Fleet, former: Path) -> None:
        self._fleet, self._former = fleet, former

    async def start(self, tree: str, *roles: str) -> list[Process]:
        """Some of them, once they are ready."""
        root = self._former if tree == "former" else ROOT
        parts = (root / part for part in ("service", "clients/python", "clients/trainer", "tests"))
        self._fleet._settings["PYTHONPATH"] = os.pathsep.join(map(str, parts))
        started = [
            self._fleet.api() if role == "api" else self._fleet.worker(seconds_per_token=SECONDS_PER_TOKEN)
            for role in roles
        ]
        await asyncio.to_thread(self._fleet.wait_until_serving, *started)
        return started

    async def ready(self, *processes: Process) -> None:
        """Until all of them are."""
        await asyncio.to_thread(self._fleet.wait_until_ready, *processes)


async def upgrade(two: Two, seconds: float) -> Counter[str]:
    """Answers by tree of the replica and status."""
    codes: Counter[str] = Counter()
    former, ours = await two.start("former", "api", "worker", "worker"), await two.start("ours", "api")
    apis = {"former": former[0], "ours": ours[0]}
    await two.ready(*former, *ours)
    async with httpx.AsyncClient(timeout=PATIENCE, limits=httpx.Limits(max_connections=None)) as client:

        async def call(number: int) -> None:
            tree, n = ("former", "ours")[number % 2], 0
            while True:
                pairs = [
                    {"prompt": f"question {number}", "chosen": f"yes {n} {i}", "rejected": "no"} for i in range(PAIRS)
                ]
                answer = await client.post(f"{apis[tree].url}/margin", json={"pairs": pairs})
                codes[f"{tree} {answer.status_code}"] += 1
                n += 1

        async def told(step: str) -> None:
            await asyncio.sleep(seconds)
            print(json.dumps({"after": step, **codes}), flush=True)

        callers = [asyncio.create_task(call(number)) for number in range(CALLERS)]
        await told("the former workers")
        new = await two.start("ours", "worker", "worker")
        await two.ready(*new)
        await asyncio.to_thread(former[1].stop)
        await told("one of the former was stopped")
        former[2].kill()
        await told("the other was killed: only ours are left")
        back = await two.start("former", "worker")
        await two.ready(*back)
        await asyncio.to_thread(new[0].stop)
        new[1].kill()
        await told("back to a former one: ours were stopped and killed")
        for caller in callers:
            caller.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
    return codes


async def main(former: Path, seconds: float) -> int:
    """Exit status."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_model(folder)
        server = RedisServer(folder, appendonly="yes")
        server.start()
        try:
            with Fleet(folder, server.url, queue="rolling", presence=10, claim_idle=30, drain_timeout=20) as fleet:
                codes = await upgrade(Two(fleet, former), seconds)
            with server.client() as client:
                letters = client.xlen(Keys("rolling").dead)
        finally:
            server.kill()
    failed = sum(number for answer, number in codes.items() if not answer.endswith("200"))
    print(json.dumps({"answers": codes.total(), "failed": failed, "dead_letters": letters}))
    return 1 if failed or letters else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("former", type=Path, help="another checkout of Inward")
    parser.add_argument("--seconds", type=float, default=20.0, help="of load in each step; above INWARD_PRESENCE")
    asked = parser.parse_args()
    sys.exit(asyncio.run(main(asked.former.resolve(), asked.seconds)))
