"""The ways side by side: each measured in a process of its own, and what that comes to."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table
from safetensors import safe_open

from inward.backbones.fingerprint import fingerprint
from inward.backbones.tokenizer import load_tokenizer
from inward.errors import InternalError
from inward.offline.bench.ways import matmul_rate
from inward.offline.bench.workload import read_texts, write_random_heads
from inward.prompts import Prompts
from inward.types import BackboneInfo

WAYS = {
    "published": "(a) one text at a time, float32, causal LM, all hidden states",
    "padded": "(b) padded batches of 8, no LM head, all hidden states",
    "ours": "(c) inward's backbone",
    "http": "(d) inward over HTTP, {callers} callers",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured.

    ``pairs`` is a file, or None for made-up words; ``n`` of them. ``heads`` are numbers of heads to measure ``ours``
    with, the first also all others, and ``pool`` is what they make of their token scores. ``callers`` are those at once
    over HTTP. In each of ``rounds`` every way has its turn; what counts is a way's median.
    """

    pairs: Path | None
    n: int
    ways: tuple[str, ...]
    heads: tuple[int, ...]
    dtype: str
    callers: int
    pool: str | None = None
    rounds: int = 1


def measure(model: Path, plan: Plan, folder: Path) -> dict[str, Any]:
    """Tokens/s, ratios and peak memory of each way for the model in ``model``; ``folder`` holds what is made for it.

    Raises:
        InternalError: a way failed.
    """
    config = json.loads((model / "config.json").read_text())
    pairs = folder / "pairs.json"
    pairs.write_text(json.dumps([asdict(p) for p in read_texts(plan.pairs, plan.n)]))
    info = BackboneInfo("bench", "", fingerprint(model), config["num_hidden_layers"], config["hidden_size"], 0, "", "")
    template = Prompts(load_tokenizer(model), max_tokens=2048).template
    turns = [(way, n) for way in plan.ways for n in (plan.heads if way == "ours" else plan.heads[:1])]
    measured: dict[tuple[str, int], list[dict[str, Any]]] = {turn: [] for turn in turns}
    rates: list[float] = []
    for _ in range(plan.rounds):
        for way, n in measured:
            heads = folder / f"heads-{n}"
            if not heads.exists():
                write_random_heads(info, template, heads, n, plan.pool)
            options = ["--dtype", plan.dtype, "--heads", str(heads), "--callers", str(plan.callers)]
            measured[way, n].append(_in_own_process([way, str(model), str(pairs), *options]))
            print(f"{way}: {measured[way, n][-1]['tokens_per_second']:,.0f} tokens/s", file=sys.stderr)
        inner = int(config.get("intermediate_size") or 4 * config["hidden_size"])
        rates.append(matmul_rate(plan.dtype, config["hidden_size"], inner))
    rows = [_median(runs) for runs in measured.values()]
    rate = median(rates)
    needed = rows[0]["needed_tokens"]
    flops = 2 * _block_parameters(model) * needed
    return {
        "dtype": plan.dtype,
        "pairs": plan.n,
        "callers": plan.callers,
        "prompt_tokens_saved": 1 - needed / rows[0]["text_tokens"],
        "matmul_flops_per_second": rate,
        "fraction_of_matmul_rate": {
            f"{r['way']}-{r['heads']}": flops / r["seconds"] / rate for r in rows if r["way"] == "ours"
        },
        "ways": rows,
    }


def report(results: Mapping[str, Any]) -> RenderableType:
    """What ``measure`` found, for people."""
    base = {row["way"]: row["tokens_per_second"] for row in reversed(results["ways"])}
    spread = ["of all rounds"] if len(results["ways"][0]["rounds"]) > 1 else []
    table = Table("way", "tokens/s", *spread, "x (a)", "x (b)", "peak memory", box=None, pad_edge=False)
    for row in results["ways"]:
        heads = f", {row['heads']} heads" if row.get("heads", 1) > 1 else ""
        name = WAYS[row["way"]].format(callers=results["callers"]) + heads
        ratios = [
            f"{row['tokens_per_second'] / base[way]:.2f}" if way in base else "" for way in ("published", "padded")
        ]
        between = [f"{min(row['rounds']):,.0f} to {max(row['rounds']):,.0f}"] if spread else []
        rate = f"{row['tokens_per_second']:,.0f}"
        table.add_row(name, rate, *between, *ratios, f"{row['peak_bytes'] / 2**20:,.0f} MiB")
    gflops = results["matmul_flops_per_second"] / 1e9
    return Lines(
        f"{results['model']}, {results['dtype']}, {results['pairs']} pairs",
        table,
        f"prompt tokens not computed twice: {results['prompt_tokens_saved']:.1%} of all tokens",
        *(
            f"{name}: {fraction:.2f} of this machine's matrix-product rate ({gflops:,.0f} GFLOP/s), needed tokens only"
            for name, fraction in results["fraction_of_matmul_rate"].items()
        ),
    )


def _median(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median times, the largest memory, and the tokens/s of all."""
    seconds, rates = ([float(run[name]) for run in runs] for name in ("seconds", "tokens_per_second"))
    peak = max(run["peak_bytes"] for run in runs)
    middle = {"seconds": median(seconds), "tokens_per_second": median(rates), "peak_bytes": peak}
    return runs[0] | middle | {"rounds": rates}


def _in_own_process(arguments: Sequence[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "inward.offline.bench.ways", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise InternalError(f"{arguments[0]} failed: {done.stderr.strip().splitlines()[-1:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _block_parameters(model: Path) -> int:
    """Parameters that multiply every token: all matrices but the embeddings."""
    total = 0
    for path in model.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                shape = file.get_slice(name).get_shape()
                if len(shape) == 2 and not any(part in name for part in ("embed", "wte", "wpe", "lm_head")):
                    total += shape[0] * shape[1]
    return total
