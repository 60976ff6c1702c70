"""How long does a score wait while somebody else draws a long answer, on the transformers backbone?

    python tests/benchmarks/score_while_drawing.py --model smollm2 --scores 200 --work runs --out waiting

Scores are asked for one after the other, first alone, then while 16 answers of 256 tokens are drawn; the time of a
token step is that of the drawing alone. The aim: with drawing, the 99th percentile is at most three times the idle one
and one token step.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from dataclasses import replace

import numpy as np
from drawn import Opened, arguments, opened, sampling, table, write

from inward.types import Group

PROMPT = tuple(range(100, 164))
ANSWER = tuple(range(200, 264))


async def waits(at: Opened, args: argparse.Namespace, until: asyncio.Task[object] | None) -> list[float]:
    """Seconds of each score; with ``until`` only while that runs."""
    head = at.heads.resolve(args.head)
    found: list[float] = []
    while len(found) < args.scores and (until is None or not until.done()):
        group = Group((*PROMPT, len(found) % 90), (ANSWER,))
        began = time.perf_counter()
        await at.backbone.read([group], [head.readout])
        found.append(time.perf_counter() - began)
        await asyncio.sleep(0.005)
    return found


async def run(args: argparse.Namespace) -> None:
    async with opened(args) as at:
        group = Group(PROMPT, sampling=replace(sampling(args, args.n, 1), max_tokens=args.tokens))
        await at.backbone.read([Group(PROMPT, (ANSWER,))], [at.heads.resolve(args.head).readout])
        idle = await waits(at, args, None)
        began = time.perf_counter()
        drawn = await at.backbone.sample(group)
        step = (time.perf_counter() - began) / max(len(sample.ids) for sample in drawn)
        drawing = asyncio.create_task(at.backbone.sample(group))
        busy = await waits(at, args, drawing)
        drawing.cancel()
        await asyncio.gather(drawing, return_exceptions=True)
    p99 = {"idle": float(np.quantile(idle, 0.99)), "drawing": float(np.quantile(busy, 0.99))}
    most = 3 * p99["idle"] + step
    results = {
        "p99_s": p99, "median_s": {"idle": float(np.median(idle)), "drawing": float(np.median(busy))},
        "step_s": step, "most_s": most, "scores": {"idle": len(idle), "drawing": len(busy)},
        "arguments": json.loads(json.dumps(vars(args), default=str)),
    }  # fmt: skip
    rows = [
        [name, f"{1000 * np.median(own):.1f}", f"{1000 * p99[name]:.1f}", str(len(own))]
        for name, own in (("idle", idle), ("drawing", busy))
    ]
    text = table(["scores", "median ms", "99 % ms", "scores asked for"], rows)
    write(args.out, results, text + f"\na token step takes {1000 * step:.1f} ms; aim: at most {1000 * most:.1f} ms\n")


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(tokens=256)
    parser.add_argument("--n", type=int, default=16)
    parser.add_argument("--scores", type=int, default=200)
    parser.add_argument("--head", default="hybrid")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
