"""Do many heads stay free? The same batches, read with one head and with more of them in turns, in one process.

    python tests/benchmarks/many_heads.py --model smollm2 --pairs PAIRS.jsonl --pools last max_rolling --out heads

A number of heads is compared with one head on the same batch a moment before or after, so a machine that is uneven from
minute to minute does not decide; the median of these ratios and its interval, over batches and rounds, are what counts.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from drawn import table, write

from inward.backbones.tokenizer import load_tokenizer
from inward.backbones.transformers.backbone import TransformersBackbone
from inward.heads import store
from inward.heads.base import Head
from inward.offline.bench.ways import grouped
from inward.offline.bench.workload import in_batches, read_texts, text_tokens, write_random_heads
from inward.processes.wiring import find_model
from inward.prompts import Prompts
from inward.settings import Settings
from inward.types import Group

POSITION = "last"
"""In place of a pool: the last token alone."""


def random_heads(backbone: TransformersBackbone, template: str, pool: str, n: int) -> list[Head]:
    """Loaded from files, as the service has them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_random_heads(backbone.info, template, folder, n, None if pool == POSITION else pool)
        return [store.load(found.path) for found in store.find(folder)]


async def seconds(backbone: TransformersBackbone, batch: list[Group], heads: list[Head]) -> float:
    """Of reading a batch and scoring all of it with all heads."""
    began = time.perf_counter()
    pooled = any(head.pools for head in heads)
    for reading in await backbone.read(batch, [head.readout for head in heads], tokens=pooled):
        for head, numbers in zip(heads, reading.readings, strict=True):
            head.score(numbers, pair=True)
    return time.perf_counter() - began


async def measured(
    backbone: TransformersBackbone, batches: list[list[Group]], heads: dict[int, list[Head]], rounds: int
) -> dict[int, list[list[float]]]:
    """Seconds by number of heads, round and batch; the order of the numbers changes from batch to batch."""
    rng = np.random.default_rng(0)
    await seconds(backbone, batches[0], heads[max(heads)])  # warms up
    found: dict[int, list[list[float]]] = {n: [[] for _ in range(rounds)] for n in heads}
    for round_ in range(rounds):
        for batch in batches:
            for n in rng.permutation(list(heads)).tolist():
                found[n][round_].append(await seconds(backbone, batch, heads[n]))
    return found


def summary(found: dict[int, list[list[float]]], tokens: int) -> dict[str, dict[str, Any]]:
    """Of each number of heads: text tokens a second in the median round, and times one head's seconds, with the 95 %
    interval of the median.
    """
    rng = np.random.default_rng(0)
    base = np.array(found[min(found)])
    rows = {}
    for n, own in found.items():
        ratios = (np.array(own) / base).ravel()
        medians = np.median(ratios[rng.integers(0, len(ratios), (2000, len(ratios)))], axis=1)
        low, high = np.quantile(medians, [0.025, 0.975])
        rate = tokens / float(np.median(np.sum(own, axis=1)))
        rows[str(n)] = {"tokens_per_second": rate, "times": [float(np.median(ratios)), float(low), float(high)]}
    return rows


async def run(args: argparse.Namespace) -> None:
    folder = find_model(Settings(model=args.model)).folder
    groups = grouped(folder, read_texts(args.pairs, args.n))
    backbone = TransformersBackbone(folder, name="bench", revision="", dtype=args.dtype)
    template = Prompts(load_tokenizer(folder), max_tokens=2048).template
    batches = in_batches(backbone, groups)
    results, rows = {}, []
    try:
        for pool in args.pools:
            heads = {n: random_heads(backbone, template, pool, n) for n in args.heads}
            results[pool] = summary(await measured(backbone, batches, heads, args.rounds), text_tokens(groups))
            for n, own in results[pool].items():
                times, low, high = own["times"]
                rows.append([pool, n, f"{own['tokens_per_second']:.0f}", f"{times:.3f} ({low:.3f} to {high:.3f})"])
    finally:
        await backbone.close()
    about = f"{len(groups)} pairs in {len(batches)} batches, {args.rounds} rounds\n\n"
    header = ["read", "heads", "tokens/s (median round)", "x the seconds of one head"]
    write(args.out, {"pools": results, "batches": len(batches)}, about + table(header, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--pairs", type=Path, help="pairs (default: made-up words of HH's lengths)")
    parser.add_argument("--n", type=int, default=32)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--pools", nargs="+", default=[POSITION], help=f"{POSITION}, or as of inward fit --pool")
    parser.add_argument("--heads", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True, help="results: OUT.json and OUT.md")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
