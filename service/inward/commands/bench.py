"""``inward bench``: this project's backbone beside the ways in which people score pairs today."""

from __future__ import annotations

import argparse
from pathlib import Path

WAYS = "published,padded,ours,http"


def add(parser: argparse.ArgumentParser) -> None:
    from inward.offline.bench.workload import SHAPES

    parser.description = (
        "Scores the same pairs in several ways, one process each, and prints tokens/s, ratios and peak "
        "memory. Tokens are those of all texts (prompt + response), whatever a way computes for them."
    )
    parser.epilog = "example: inward bench --shape qwen2-0.5b --pairs pairs.jsonl --n 64"
    add = parser.add_argument
    add(
        "--model",
        default="smollm2",
        help="as everywhere: a folder, GGUF file, hub id, smollm2 or toy (default: %(default)s)",
    )
    add("--shape", choices=sorted(SHAPES), help="instead: a model of this shape with random weights")
    add("--pairs", type=Path, help="JSONL with prompt, chosen, rejected (default: made-up words of HH's lengths)")
    add("--n", type=int, default=64, help="pairs (default: %(default)s)")
    add("--dtype", default="auto", help="of (b), (c) and (d); auto: as the service takes it (default: %(default)s)")
    add("--callers", type=int, default=32, help="at once, of (d) (default: %(default)s)")
    add("--ways", default=WAYS, help="comma-separated (default: %(default)s)")
    add("--heads", type=int, nargs="+", default=[1], help="numbers of heads to measure (c) with (default: 1)")
    add("--pool", metavar="NAME", help="of the heads, as inward fit takes it (default: the last token)")
    add("--rounds", type=int, default=1, help="all ways in turn so often; medians (default: 1)")
    add("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> int:
    import json
    import tempfile

    from rich.console import Console

    from inward.backbones.device import choose_device, choose_dtype
    from inward.offline.bench.measure import Plan, measure, report
    from inward.offline.bench.workload import write_random_model
    from inward.processes.wiring import TOY, find_model
    from inward.settings import Settings

    with tempfile.TemporaryDirectory(prefix="inward-bench-") as made:
        folder = Path(made)
        if args.shape:
            model = folder / "model"
            write_random_model(args.shape, model, TOY / "backbone")
        else:
            model = find_model(Settings(model=args.model)).folder
        dtype = str(choose_dtype(args.dtype, choose_device("auto"))).removeprefix("torch.")
        ways, heads = tuple(args.ways.split(",")), tuple(args.heads)
        plan = Plan(args.pairs, args.n, ways, heads, dtype, args.callers, args.pool, max(args.rounds, 1))
        results = {"model": args.shape or args.model, **measure(model, plan, folder)}
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        Console(width=None if Console().is_terminal else 160).print(report(results))
    return 0
