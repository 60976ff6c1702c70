"""Is early rejection worth it? The frontier of reward against tokens drawn.

    inward fit value --head hybrid --prompts TRAIN.jsonl --out heads/hybrid-value
    python tests/benchmarks/early_rejection.py --prompts HELD_OUT.jsonl --work runs --out frontier --heads heads

Every prompt is answered ``--n`` times to the end, once; what plain best-of-N and each way of rejecting would have drawn
and picked is worked out from that by the code that serves (``heads.rejection``). Rewards are those of the picking head
and of a judging head that took no part, in its standard deviations over all answers. With ``--timed`` some prompts are
also drawn with rejection, against the clock.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from drawn import Answers, Doubles, Opened, arguments, interval, many, opened, sampling, shown, table, write

from inward.heads.base import Head
from inward.heads.rejection import Rejecting, keep_share
from inward.heads.watch import watch
from inward.types import EarlyRejection, Group

SCHEDULES = ((8,), (16,), (32,), (8, 16), (16, 32), (8, 16, 32), (16, 32, 64))
LENGTHS = (8, 16, 32, 64)
PLAIN = "best of 8"
"""What the others are compared with, prompt by prompt."""


def survivors(running: Sequence[Doubles], at: Sequence[int], keep: float) -> tuple[list[int], int]:
    """Who is drawn to the end, and how many tokens are drawn, by running scores at every token."""
    rejecting = Rejecting(len(running), at, keep_share(keep))
    for n, scores_T in enumerate(running):
        for point in at:
            if len(scores_T) >= point:
                rejecting.reached(n, float(scores_T[point - 1]))
    rejecting.ended(range(len(running)))
    out = rejecting.decide()
    left = [n for n in range(len(running)) if n not in out]
    return left, sum(out[n][0] if n in out else len(running[n]) for n in range(len(running)))


def means(tokens: Sequence[Doubles]) -> list[Doubles]:
    """The mean of each answer's scores so far."""
    return [np.cumsum(scores) / np.arange(1, len(scores) + 1) for scores in tokens]


def running(answers: Answers, head: Head) -> list[Doubles]:
    """As ``heads.watch`` has them: a value head's own pool, else the mean."""
    pool = head.manifest.pool
    last = pool is not None and pool.name == "last"
    return answers.tokens[head.ref.name] if last else means(answers.tokens[head.ref.name])


def frontier(runs: Sequence[Answers], pick: str, judge: str, deciding: Sequence[Head], n: int) -> list[dict[str, Any]]:
    """One point for each way."""
    spread = {name: np.concatenate([run.final[name] for run in runs]).std() for name in (pick, judge)}
    level = {name: np.concatenate([run.final[name] for run in runs]).mean() for name in (pick, judge)}
    ways: list[tuple[str, Any]] = [
        (f"best of {k}", lambda run, k=k: (range(k), sum(map(len, run.ids[:k]))))
        for k in (1, 2, 4, 8, 16, 32)
        if k <= n
    ]
    for head in deciding:
        for start in (16, 32) if n >= 32 else (n,):
            for at in SCHEDULES:
                ways.append(
                    (
                        f"{start} by {head.ref.name}, half at {', '.join(map(str, at))}",
                        lambda run, at=at, start=start, head=head: survivors(running(run, head)[:start], at, 0.5),
                    )
                )
    points: list[dict[str, Any]] = []
    plain: dict[str, Doubles] = {}
    for name, way in ways:
        drawn, rewards, judged = [], [], []
        for run in runs:
            left, tokens = way(run)
            best = max(left, key=lambda i: run.final[pick][i])
            drawn.append(tokens)
            rewards.append((run.final[pick][best] - level[pick]) / spread[pick])
            judged.append((run.final[judge][best] - level[judge]) / spread[judge])
        own = {"reward": np.array(rewards), "judged": np.array(judged)}
        plain = own if name == PLAIN else plain
        more = {f"{value} more": interval(own[value] - plain[value]) for value in own if plain}
        tokens = {"tokens": interval(np.array(drawn, float))}
        points.append({"way": name} | tokens | {value: interval(own[value]) for value in own} | more)
    return points


def correlations(runs: Sequence[Answers], pick: str, head: Head) -> dict[str, float]:
    """Of the running score after so many tokens with the finished reward, within a prompt."""
    found = {}
    for at in LENGTHS:
        x, y = [], []
        for run in runs:
            scores = running(run, head)
            there = [i for i, own in enumerate(scores) if len(own) >= at]
            if len(there) > 1:
                values, finals = np.array([scores[i][at - 1] for i in there]), run.final[pick][there]
                x += [values - values.mean()]
                y += [finals - finals.mean()]
        if x:
            found[str(at)] = float(np.corrcoef(np.concatenate(x), np.concatenate(y))[0, 1])
    return found


async def timed(at: Opened, groups: Sequence[Group], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds and tokens with and without rejection, so many prompts at once."""
    head = at.heads.resolve(args.pick)
    room = asyncio.Semaphore(args.callers)

    async def tokens(group: Group, rule: EarlyRejection | None) -> int:
        assert group.sampling is not None
        spec = replace(group.sampling, n=min(16, args.n), early_rejection=rule)
        looks = watch(spec, args.pick, at.heads)
        async with room:
            samples, _ = await at.backbone.sample_and_read(replace(group, sampling=spec), [head.readout], watch=looks)
        return sum(len(sample.ids) + sample.held_back for sample in samples)

    found: dict[str, dict[str, float]] = {}
    for name, rule in (("to the end", None), ("half at 16, 32", EarlyRejection(0.5, (16, 32)))):
        began = time.perf_counter()
        drawn = await asyncio.gather(*(tokens(group, rule) for group in groups[: args.timed]))
        found[name] = {"seconds": time.perf_counter() - began, "tokens": sum(drawn)}
    return found


def plot(points: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "inward"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharex=True)
    for part, value in zip(axes, ("reward", "judged"), strict=True):
        for kind in dict.fromkeys(_kind(point["way"]) for point in points):
            own = sorted((p for p in points if _kind(p["way"]) == kind), key=lambda p: p["tokens"][0])
            mean, low, high = np.array([p[value] for p in own]).T
            style = "o-" if kind == "plain" else "x"
            x = [p["tokens"][0] for p in own]
            part.errorbar(x, mean, (mean - low, high - mean), fmt=style, capsize=2, label=kind, linewidth=1)
        part.set(xscale="log", xlabel="tokens drawn for a prompt", ylabel=f"{value} (standard deviations)")
    axes[0].legend(fontsize="small")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


def _kind(way: str) -> str:
    return "plain" if way.startswith("best of") else way.partition(",")[0]


async def run(args: argparse.Namespace) -> None:
    async with opened(args) as at:
        pick, judge = at.heads.resolve(args.pick), at.heads.resolve(args.judge)
        value = at.heads.value_of(args.pick)
        deciding = [pick] if value is None else [value, pick]
        groups = [
            Group(group.prompt_ids, sampling=sampling(args, args.n, args.n * i))
            for i, group in enumerate(await at.groups(args.prompts, args.count, args.tokens))
        ]
        found = await many(at, groups, [pick, judge, *([value] if value else [])], args.work)
        runs = [answers for _, answers in found]
        clock = await timed(at, groups, args) if args.timed else {}
    points = frontier(runs, args.pick, args.judge, deciding, args.n)
    predicts = {head.ref.name: correlations(runs, args.pick, head) for head in deciding}
    results = {"prompts": len(runs), "n": args.n, "frontier": points, "correlations": predicts, "timed": clock}
    values = ("reward", "reward more", "judged", "judged more")
    rows = [
        [p["way"], f"{p['tokens'][0]:.0f}", *(shown(p[value]) if value in p else "" for value in values)]
        for p in points
    ]
    text = f"{len(runs)} prompts, {args.n} answers each, up to {args.tokens} tokens\n\n"
    header = ["way", "tokens a prompt", f"reward ({args.pick})", f"more than {PLAIN}", f"judged ({args.judge})"]
    text += table([*header, f"more than {PLAIN}"], rows) + "\n"
    lengths = [str(length) for length in LENGTHS]
    row = [[name, *(f"{own[k]:.2f}" if k in own else "" for k in lengths)] for name, own in predicts.items()]
    text += table(["correlation with the finished reward after … tokens", *lengths], row)
    for name, own in clock.items():
        text += f"\n{name}: {own['tokens']:.0f} tokens in {own['seconds']:.1f} s"
    write(args.out, results | {"arguments": json.loads(json.dumps(vars(args), default=str))}, text + "\n")
    plot(points, args.out.with_suffix(".svg"))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--n", type=int, default=32)
    parser.add_argument("--pick", default="hybrid")
    parser.add_argument("--judge", default="legend")
    parser.add_argument("--timed", type=int, default=0, help="prompts to draw against the clock")
    parser.add_argument("--callers", type=int, default=1, help="of these, so many at once (default: 1)")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
