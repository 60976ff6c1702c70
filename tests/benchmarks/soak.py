"""Hours of mixed traffic with online updates, policy switches, bulk jobs and random deaths: does anything grow, and is
anything lost?

    python tests/benchmarks/soak.py --hours 6 --out soak

Two API replicas and two workers of the toy stand around a Redis of their own. One of each lives all the time and is
watched; the others are killed, or told to stop, every so often, and started again. Every score is compared with the
first one of the same text under the same policy, and what was drawn is scored again; rows of bulk jobs, and of the
stream that they append to, are counted. OUT.json holds the samples (it is written as they come) and what was logged as
an error, OUT.svg draws the samples. Ends with 1 if an answer was wrong or lost.

Where all of it is stopped, or killed, the same command goes on, with what Redis and the heads had written down
(OUT.kept, until the hours are over) and all that is known of earlier answers: one more death, of everything at once.
With OUT.json alone, as on another machine, it goes on with a Redis that is new and an adapter that is trained anew.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from drawn import table

sys.path.insert(0, str(Path(__file__).parents[1]))
from inward.processes.wiring import TOY
from inward.stores.keys import Keys
from support.adapters import train_adapter
from support.fleet import Fleet, Process
from support.redis_server import RedisServer

QUESTIONS, ROWS = 200, 100
ADAPTER = "other"
MOST_ERRORS = 100
"""Lines of log that are kept."""
WORDS = "lock door river paper bread light engine sugar garden window letter market doctor bridge silver winter".split()


def pair(n: int) -> dict[str, str]:
    """The ``n``-th of the questions, with two answers."""
    rng = random.Random(n)
    said = [" ".join(rng.choices(WORDS, k=rng.randint(3, 40))) for _ in range(3)]
    return {"prompt": f"Question {n}: {said[0]}", "chosen": said[1], "rejected": said[2]}


def same(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-3)


def so_far(file: Path) -> dict[str, Any]:
    """What was written down, or nothing."""
    return json.loads(file.read_text("utf-8")) if file.exists() else {}


class Soak:
    """What runs, what was answered, and what was seen."""

    def __init__(self, fleet: Fleet, server: RedisServer, args: argparse.Namespace) -> None:
        self.fleet, self.args, self.redis = fleet, args, server.client()
        self.apis, self.workers = [fleet.api(), fleet.api()], [fleet.worker(), fleet.worker()]
        fleet.wait_until_ready(*self.apis, *self.workers)
        self.http = httpx.AsyncClient(timeout=args.timeout + 30, limits=httpx.Limits(max_connections=None))
        self.waits: list[float] = []
        self.api_died = -math.inf
        file = args.out.with_suffix(".json")
        earlier = so_far(file)
        self.outcomes: Counter[str] = Counter(earlier.get("outcomes", {}))
        self.samples: list[dict[str, float]] = earlier.get("samples", [])
        self.errors: list[str] = earlier.get("errors", [])
        self.known = {(what, policy, n): value for what, policy, n, value in earlier.get("known", [])}
        self.job: str | None = earlier.get("job")
        """Of the bulk job that runs."""
        self.streamed: str = earlier.get("streamed", "-")
        """The last entry of the stream that was counted."""
        before = self.samples[-1]["hours"] if self.samples else 0.0
        self.began: list[float] = [*earlier.get("began", []), before]
        """After how many hours the command was given, each time."""
        self.since = time.monotonic() - 3600 * before

    @property
    def hours(self) -> float:
        """Of all times together."""
        return (time.monotonic() - self.since) / 3600

    async def ask(self, path: str, body: Any, *, api: int | None = None, **options: Any) -> httpx.Response | None:
        """An answer of one replica or the other; None where the death of that replica took it along."""
        while True:
            which = random.randrange(2) if api is None else api
            began = time.monotonic()
            try:
                answer = await self.http.post(self.apis[which].url + path, json=body, **options)
            except httpx.TransportError as error:
                died = time.monotonic() - self.api_died < self.args.timeout + 30 and which == 1
                self.outcomes["went with its replica" if died else f"LOST: {type(error).__name__}"] += 1
                return None
            if answer.status_code != 503:
                self.waits.append(time.monotonic() - began)
                return answer
            self.outcomes["asked to come again"] += 1
            await asyncio.sleep(min(float(answer.headers.get("retry-after", 1)), 2))

    def check(self, what: str, policy: str, n: int, value: float) -> None:
        """Against what was said first."""
        right = math.isfinite(value) and same(self.known.setdefault((what, policy, n), value), value)
        self.outcomes[f"{what}: right" if right else f"{what}: WRONG"] += 1

    async def margins(self) -> None:
        some = random.sample(range(QUESTIONS), random.randint(1, 4))
        answer = await self.ask("/margin", {"pairs": [pair(n) for n in some], "head": "legend"})
        for n, margin in zip(some, self.of(answer, "margins"), strict=False):
            self.check("margin", answer.json()["policy_version"], n, margin["margin"])

    async def scores(self) -> None:
        n = random.randrange(QUESTIONS)
        item = {"prompt": pair(n)["prompt"], "response": pair(n)["chosen"]}
        answer = await self.ask("/score", {"items": [item], "head": "legend", "detail": ["tokens"]})
        for score in self.of(answer, "scores"):
            self.check("score", answer.json()["policy_version"], n, score["score"])

    async def rewards(self) -> None:
        answer = await self.ask("/reward", {"pairs": [pair(random.randrange(QUESTIONS))], "head": "hybrid"})
        for reward in self.of(answer, "rewards"):
            self.outcomes["reward: " + ("right" if math.isfinite(reward["chosen_score"]) else "WRONG")] += 1

    async def draws(self) -> None:
        prompt = pair(random.randrange(QUESTIONS))["prompt"]
        body = {"prompt": prompt, "n": 2, "head": "legend", "sampling": {"max_tokens": 16}, "return_token_ids": True}
        drawn = await self.ask("/rerank", body)
        results = [result for result in self.of(drawn, "results") if result["token_ids"]]
        if not results:
            return
        items = [{"prompt": prompt, "response_ids": result["token_ids"]} for result in results]
        again = await self.ask("/score", {"items": items, "head": "legend"})
        scores = self.of(again, "scores")
        if scores and again.json()["policy_version"] == drawn.json()["policy_version"]:
            pairs = zip(results, scores, strict=True)
            right = all(same(result["score"], score["score"]) for result, score in pairs)
            self.outcomes[f"drawn: {'right' if right else 'WRONG'}"] += 1

    def of(self, answer: httpx.Response | None, name: str) -> list[dict[str, Any]]:
        """Its entries, none of which may be an error."""
        if answer is None:
            return []
        if answer.status_code != 200:
            self.outcomes[f"LOST: {answer.status_code} {answer.text[:120]}"] += 1
            return []
        entries = answer.json()[name]
        failed = [entry["error"] for entry in entries if entry.get("error")]
        self.outcomes.update(f"LOST: {error['message'][:80]}" for error in failed)
        return [entry for entry in entries if not entry.get("error")]

    async def caller(self) -> None:
        kinds: list[Callable[[], Awaitable[None]]] = [self.margins, self.scores, self.rewards, self.draws]
        while True:
            await asyncio.sleep(random.expovariate(self.args.rate / self.args.callers))
            await random.choices(kinds, [50, 30, 10, 10])[0]()

    async def bulk(self) -> None:
        rows = "\n".join(json.dumps(pair(n)) for n in range(ROWS))
        headers = {"content-type": "application/x-ndjson"}
        path = f"{self.apis[0].url}/jobs?kind=margin&head=legend&append_to=soak"
        while True:
            if self.job is None:
                await asyncio.sleep(self.args.every)
                begun = await self.http.post(path, content=rows, headers=headers)
                if begun.status_code != 201:
                    self.outcomes[f"bulk: not taken, {begun.status_code}"] += 1
                    continue
                self.job = begun.json()["id"]
                self.write()
            job = f"{self.apis[0].url}/jobs/{self.job}"
            while (await self.http.get(job)).json()["state"] not in ("done", "failed", "cancelled"):
                await asyncio.sleep(1)
            results = [json.loads(line) for line in (await self.http.get(f"{job}/results")).text.splitlines()]
            whole = [row["index"] for row in results] == list(range(ROWS)) and not any(row["error"] for row in results)
            self.outcomes["bulk: whole" if whole else "bulk: LOST rows"] += 1
            for row in results if whole else ():
                known = [self.known.get(("margin", policy, row["index"])) for policy in ("base", ADAPTER)]
                if None not in known and not any(same(row["margin"], value) for value in known):
                    self.outcomes["bulk: WRONG"] += 1
            after = self.streamed if self.streamed == "-" else f"({self.streamed}"
            entries = self.redis.xrange(Keys("soak").scores("soak"), min=after)
            indices = sorted(json.loads(fields[b"row"])["index"] for _, fields in entries)
            self.outcomes["stream: each row once" if indices == list(range(ROWS)) else "stream: LOST or twice"] += 1
            self.job, self.streamed = None, entries[-1][0].decode() if entries else self.streamed
            self.write()

    async def updates(self) -> None:
        head = (await self.http.get(f"{self.apis[0].url}/heads/hybrid")).json()
        for sequence in itertools.count(head["sequence"] + 1):
            await asyncio.sleep(self.args.every * 0.7)
            body = {"sequence": sequence, "pairs": [pair(n) for n in random.sample(range(QUESTIONS), 8)]}
            answer = await self.ask("/heads/hybrid/update", body, api=0)
            self.outcomes[f"update: {answer.status_code if answer else 'LOST'}"] += 1

    async def switches(self) -> None:
        for version in itertools.cycle((ADAPTER, "base")):
            await asyncio.sleep(self.args.every * 1.3)
            answer = await self.ask("/policy", {"version": version}, api=0)
            self.outcomes[f"policy switch: {answer.status_code if answer else 'LOST'}"] += 1

    async def deaths(self) -> None:
        for kind, how in itertools.cycle(itertools.product(("worker", "api"), ("kill", "stop"))):
            await asyncio.sleep(self.args.every * random.uniform(0.5, 1.5))
            there = self.workers if kind == "worker" else self.apis
            dying = there[1]
            if kind == "api":
                self.api_died = time.monotonic()
            await asyncio.to_thread(getattr(dying, how))
            born = self.fleet.worker() if kind == "worker" else self.fleet.api()
            await asyncio.to_thread(self.fleet.wait_until_serving, born)
            there[1] = born
            self.keep_errors(dying)
            self.outcomes[f"deaths: {kind}, {how}"] += 1

    async def watch(self) -> None:
        while True:
            await asyncio.sleep(self.args.sample)
            self.samples.append(await asyncio.to_thread(self.sample))
            for process in (*self.apis, *self.workers):
                self.keep_errors(process)
            self.write()

    def keep_errors(self, process: Process) -> None:
        """What it logged as one since the last time, and what is no log at all, as a traceback; the rest is let go."""
        said = [process.log.pop(0) for _ in range(len(process.log))]
        events = [json.loads(line) for line in said if line.startswith("{")]
        self.outcomes.update(f"logged: {event['event']}" for event in events if event["level"] == "error")
        errors = [line for line in said if '"level": "error"' in line or not line.startswith("{")]
        self.errors += errors[: MOST_ERRORS - len(self.errors)]

    def sample(self) -> dict[str, float]:
        """What the two that live all the time hold, Redis, and how long callers waited since the last one."""
        waits, self.waits = sorted(self.waits) or [math.nan], []
        info = self.redis.info("memory")
        found = {
            "hours": self.hours, "answers": len(waits), "median_ms": 1e3 * waits[len(waits) // 2],
            "p99_ms": 1e3 * waits[int(0.99 * len(waits))], "redis_mib": info["used_memory"] / 2**20,
            "redis_keys": self.redis.dbsize(), "redis_clients": self.redis.info("clients")["connected_clients"],
        }  # fmt: skip
        for name, process in (("api", self.apis[0]), ("worker", self.workers[0])):
            held = psutil.Process(process.popen.pid)
            found |= {f"{name}_mib": held.memory_info().rss / 2**20, f"{name}_files": held.num_fds()}
        return found

    def write(self) -> None:
        result = {
            "outcomes": dict(sorted(self.outcomes.items())), "samples": self.samples, "errors": self.errors,
            "known": [[*key, value] for key, value in self.known.items()],
            "job": self.job, "streamed": self.streamed, "began": self.began,
        }  # fmt: skip
        aside = self.args.out.with_suffix(".part")
        aside.write_text(json.dumps(result))
        aside.replace(self.args.out.with_suffix(".json"))

    async def run(self) -> None:
        jobs = [self.bulk(), self.updates(), self.switches(), self.deaths(), self.watch()]
        tasks = [asyncio.create_task(job) for job in (*jobs, *(self.caller() for _ in range(self.args.callers)))]
        left = 3600 * (self.args.hours - self.hours)
        done, _ = await asyncio.wait(tasks, timeout=left, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.http.aclose()
        for process in (*self.apis, *self.workers):
            self.keep_errors(process)
        for task in done:
            task.result()
        self.outcomes["dead letters: LOST"] += int(self.redis.xlen(Keys("soak").dead))
        self.write()


def report(samples: list[dict[str, float]]) -> str:
    """Each measure in the second quarter and in the last, and how it moves in the second half."""
    quarter = max(len(samples) // 4, 1)
    rows = []
    for name in samples[0]:
        values = np.array([sample[name] for sample in samples])
        if name in ("hours", "answers"):
            continue
        half = slice(len(samples) // 2, None)
        hours = np.array([sample["hours"] for sample in samples])[half]
        slope = np.polyfit(hours, values[half], 1)[0] if len(hours) > 2 else math.nan
        first, last = np.nanmedian(values[quarter : 2 * quarter]), np.nanmedian(values[-quarter:])
        rows.append([name, f"{first:,.1f}", f"{last:,.1f}", f"{slope:+,.2f}"])
    return table(["measure", "median, second quarter", "median, last quarter", "an hour, second half"], rows)


def plot(samples: list[dict[str, float]], began: list[float], path: Path) -> None:
    """Memory, latency, files and Redis over the hours; a line where everything was started again."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "inward"
    import matplotlib.pyplot as plt

    panels = (
        ("memory, MiB", ("worker_mib", "api_mib")), ("latency, ms", ("p99_ms", "median_ms")),
        ("Redis, MiB", ("redis_mib",)), ("open files", ("worker_files", "api_files", "redis_clients")),
    )  # fmt: skip
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), sharex=True)
    for ax, (title, names) in zip(axes.flat, panels, strict=True):
        for name in names:
            label = name.rsplit("_", 1)[0].replace("_", " ")
            ax.plot([s["hours"] for s in samples], [s[name] for s in samples], label=label, linewidth=1)
        ax.set(title=title, ylim=(0, None))
        ax.legend(fontsize="small", frameon=False)
        for hours in began[1:]:
            ax.axvline(hours, color="grey", linestyle=":", linewidth=1)
    for ax in axes[1]:
        ax.set_xlabel("hours")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


def main() -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=6.0)
    parser.add_argument("--callers", type=int, default=8)
    parser.add_argument("--rate", type=float, default=8.0, help="requests a second, of all callers (default: 8)")
    parser.add_argument("--every", type=float, default=60.0, help="seconds between bulk jobs; the rest follows them")
    parser.add_argument("--sample", type=float, default=15.0, help="seconds between two looks (default: 15)")
    parser.add_argument("--timeout", type=float, default=90.0, help="seconds that a request may take (default: 90)")
    parser.add_argument("--out", type=Path, default=Path("soak"), help="OUT.json and OUT.svg")
    args = parser.parse_args()
    random.seed(0)
    folder, file = args.out.with_suffix(".kept").absolute(), args.out.with_suffix(".json")
    if not folder.exists():  # neither Redis nor the adapter can go on
        earlier = so_far(file)
        if not earlier.get("samples") or earlier["samples"][-1]["hours"] > 0.99 * args.hours:
            earlier = {}
        known = [entry for entry in earlier.get("known", []) if entry[1] == "base"]
        file.write_text(json.dumps(earlier | {"known": known, "job": None, "streamed": "-"}), encoding="utf-8")
        with tempfile.TemporaryDirectory(dir=args.out.absolute().parent) as made:
            shutil.copytree(TOY / "heads", Path(made) / "whole" / "heads")
            train_adapter(TOY / "backbone", Path(made) / "whole" / "adapters" / ADAPTER, size=0.1)
            (Path(made) / "whole").rename(folder)
    server = RedisServer(folder, appendonly="yes")
    server.start()
    settings: dict[str, Any] = {
        "queue": "soak", "heads": folder / "heads", "adapters": folder / "adapters",
        "presence": 10, "claim_idle": 30, "drain_timeout": 20, "timeout": args.timeout,
        "dtype": "float32",  # what is drawn is read in other batches than what is scored: bfloat16 tells them apart
    }  # fmt: skip
    try:
        with Fleet(folder, server.url, demo=True, backbone="transformers", **settings) as fleet:
            soak = Soak(fleet, server, args)
            asyncio.run(soak.run())
    finally:
        server.kill()
    shutil.rmtree(folder)
    print(json.dumps(dict(sorted(soak.outcomes.items())), indent=1))
    print(report(soak.samples))
    plot(soak.samples, soak.began, args.out.with_suffix(".svg"))
    return int(any(("LOST" in name or "WRONG" in name) and count for name, count in soak.outcomes.items()))


if __name__ == "__main__":
    sys.exit(main())
