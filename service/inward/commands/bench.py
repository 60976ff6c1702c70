"""``inward bench``: this project's backbone beside the ways in which people score pairs today."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from inward.backbones.fingerprint import fingerprint
from inward.errors import InternalError
from inward.offline.bench.ways import matmul_rate
from inward.offline.bench.workload import SHAPES, read_texts, write_random_heads, write_random_model
from inward.processes.wiring import TOY, find_model, open_prompts
from inward.settings import Settings
from inward.types import BackboneInfo

WAYS = {
    "published": "(a) one text at a time, float32, causal LM, all hidden states",
    "padded": "(b) padded batches of 8, no LM head, all hidden states",
    "ours": "(c) inward's backbone",
    "http": "(d) inward over HTTP, {callers} callers",
}


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure this machine",
        description="Scores the same pairs in several ways, one process each, and prints tokens/s, ratios and peak memory. Tokens are "
        "those of all texts (prompt + response), whatever a way computes for them.",
        epilog="example: inward bench --shape qwen2-0.5b --pairs pairs.jsonl --n 64",
    )
    parser.add_argument("--model", default="smollm2", help="as everywhere: a folder, GGUF file, hub id, smollm2 or toy (default: %(default)s)")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="instead: a model of this shape with random weights")
    parser.add_argument(
        "--pairs", type=Path, help="JSONL with prompt, chosen, rejected (default: made-up words of HH's lengths)"
    )
    parser.add_argument("--n", type=int, default=64, help="pairs (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="of (b), (c) and (d) (default: %(default)s)")
    parser.add_argument("--callers", type=int, default=32, help="at once, of (d) (default: %(default)s)")
    parser.add_argument("--ways", default=",".join(WAYS), help="comma-separated (default: %(default)s)")
    parser.add_argument(
        "--heads", type=int, nargs="+", default=[1], help="numbers of heads to measure (c) with (default: 1)"
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="inward-bench-") as folder:
        results = _measure(args, Path(folder))
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        _show(results)
    return 0


def _measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    settings = Settings(model=args.model)
    model = find_model(settings).folder
    if args.shape:
        model = folder / "model"
        write_random_model(args.shape, model, TOY / "backbone")
    config = json.loads((model / "config.json").read_text())
    pairs = folder / "pairs.json"
    pairs.write_text(json.dumps([asdict(p) for p in read_texts(args.pairs, args.n)]))
    info = BackboneInfo("bench", "", fingerprint(model), config["num_hidden_layers"], config["hidden_size"], 0, "", "")
    template = open_prompts(settings, find_model(Settings(model=str(model))), 2048).template
    rows: list[dict[str, Any]] = []
    for way in args.ways.split(","):
        for n in args.heads if way == "ours" else args.heads[:1]:
            heads = folder / f"heads-{n}"
            if not heads.exists():
                write_random_heads(info, template, heads, n)
            options = ["--dtype", args.dtype, "--heads", str(heads), "--callers", str(args.callers)]
            rows.append(_in_own_process([way, str(model), str(pairs), *options]))
            print(f"{way}: {rows[-1]['tokens_per_second']:,.0f} tokens/s", file=sys.stderr)
    rate = matmul_rate(args.dtype, config["hidden_size"], config.get("intermediate_size") or 4 * config["hidden_size"])
    needed = rows[0]["needed_tokens"]
    flops = 2 * _block_parameters(model) * needed
    return {
        "model": args.shape or args.model,
        "dtype": args.dtype,
        "pairs": args.n,
        "callers": args.callers,
        "prompt_tokens_saved": 1 - needed / rows[0]["text_tokens"],
        "matmul_flops_per_second": rate,
        "fraction_of_matmul_rate": {
            f"{r['way']}-{r['heads']}": flops / r["seconds"] / rate for r in rows if r["way"] == "ours"
        },
        "ways": rows,
    }  # fmt: skip


def _in_own_process(arguments: Sequence[str]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "inward.offline.bench.ways", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise InternalError(f"{arguments[0]} failed: {done.stderr.strip().splitlines()[-1:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _block_parameters(model: Path) -> int:
    """Parameters that multiply every token: all matrices but the embeddings."""
    from safetensors import safe_open

    total = 0
    for path in model.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                shape = file.get_slice(name).get_shape()
                if len(shape) == 2 and not any(part in name for part in ("embed", "wte", "wpe", "lm_head")):
                    total += shape[0] * shape[1]
    return total


def _show(results: dict[str, Any]) -> None:
    base = {row["way"]: row["tokens_per_second"] for row in reversed(results["ways"])}
    table = Table("way", "tokens/s", "x (a)", "x (b)", "peak memory", box=None, pad_edge=False)
    for row in results["ways"]:
        name = WAYS[row["way"]].format(callers=results["callers"]) + (
            f", {row['heads']} heads" if row.get("heads", 1) > 1 else ""
        )
        ratios = [
            f"{row['tokens_per_second'] / base[way]:.2f}" if way in base else "" for way in ("published", "padded")
        ]
        table.add_row(name, f"{row['tokens_per_second']:,.0f}", *ratios, f"{row['peak_bytes'] / 2**20:,.0f} MiB")
    console = Console(width=None if Console().is_terminal else 160)
    console.print(f"{results['model']}, {results['dtype']}, {results['pairs']} pairs")
    console.print(table)
    console.print(f"prompt tokens not computed twice: {results['prompt_tokens_saved']:.1%} of all tokens")
    for name, fraction in results["fraction_of_matmul_rate"].items():
        rate = results["matmul_flops_per_second"] / 1e9
        console.print(
            f"{name}: {fraction:.2f} of this machine's matrix-product rate ({rate:,.0f} GFLOP/s), needed tokens only"
        )
