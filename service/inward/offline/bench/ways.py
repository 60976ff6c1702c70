"""The ways to score the same pairs, each measured in a process of its own, so that its peak memory is its own.

    python -m inward.offline.bench.ways WAY MODEL PAIRS_JSON [OPTIONS]      prints one JSON object

Ways: ``published`` one text at a time, float32, all hidden states (how LEGEND was published); ``padded`` batches of
eight in the model's dtype, all hidden states; ``ours`` this project's backbone; ``http`` the same through ``inward
serve`` with concurrent callers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from inward.backbones.device import choose_device
from inward.backbones.tokenizer import load_tokenizer
from inward.heads.base import Head
from inward.offline.bench.workload import in_batches, needed_tokens, text_tokens
from inward.offline.data.pairs import Pair
from inward.prompts import Prompts
from inward.types import Group

PADDED_ROWS = 8
"""Of a padded batch."""
WARM_UP = 4
"""Pairs that are computed before the clock starts."""


def grouped(model: Path, pairs: Sequence[Pair]) -> list[Group]:
    """The pairs as the service tokenises them."""
    prompts = Prompts(load_tokenizer(model), max_tokens=2048)
    return [prompts.group(p.prompt, [p.chosen, p.rejected], truncate=True).group for p in pairs]


def published(model: Path, groups: Sequence[Group]) -> float:
    """Seconds for one text at a time in float32 with every layer's hidden states."""
    import torch
    from transformers import AutoModelForCausalLM

    device = choose_device("auto")
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device)

    @torch.inference_mode()
    def run(groups: Sequence[Group]) -> None:
        for group in groups:
            for ids in group.responses_ids:
                ids_1T = torch.tensor([group.prompt_ids + ids], device=device)
                lm(input_ids=ids_1T, output_hidden_states=True, use_cache=False).hidden_states[-1][:, -1].cpu()

    return _timed(run, groups)


def padded(model: Path, groups: Sequence[Group], *, dtype: str) -> float:
    """Seconds for right-padded batches, in the order given, with every layer's hidden states; a careful user leaves
    out the LM head.
    """
    import torch
    from transformers import AutoModel

    device = choose_device("auto")
    base = AutoModel.from_pretrained(model, dtype=getattr(torch, dtype)).to(device)

    @torch.inference_mode()
    def run(groups: Sequence[Group]) -> None:
        rows = [group.prompt_ids + ids for group in groups for ids in group.responses_ids]
        for start in range(0, len(rows), PADDED_ROWS):
            part = rows[start : start + PADDED_ROWS]
            width = max(map(len, part))
            ids_BT = torch.tensor([row + (0,) * (width - len(row)) for row in part])
            mask_BT = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in part])
            given = {"input_ids": ids_BT.to(device), "attention_mask": mask_BT.to(device)}
            base(**given, output_hidden_states=True, use_cache=False).hidden_states[-1][:, -1].cpu()

    return _timed(run, groups)


def ours(model: Path, groups: Sequence[Group], *, dtype: str, heads: Path) -> tuple[float, int]:
    """Seconds with this project's backbone and the loaded heads, and how many heads."""
    from inward.backbones.transformers.backbone import TransformersBackbone
    from inward.heads import store

    backbone = TransformersBackbone(model, name="bench", revision="", dtype=dtype)
    loaded: list[Head] = [store.load(found.path) for found in store.find(heads)]

    readouts = [head.readout for head in loaded]

    async def read(groups: Sequence[Group]) -> None:
        for part in in_batches(backbone, groups):
            for reading in await backbone.read(part, readouts, tokens=any(head.pools for head in loaded)):
                for head, numbers in zip(loaded, reading.readings, strict=True):
                    head.score(numbers, pair=True)

    seconds = _timed(lambda groups: asyncio.run(read(groups)), groups)
    asyncio.run(backbone.close())
    return seconds, len(loaded)


def http(model: Path, pairs: Sequence[Pair], *, dtype: str, heads: Path, callers: int) -> tuple[float, int]:
    """Seconds through ``inward serve`` with ``callers`` at once, one pair a request; and the server's peak memory in
    bytes.
    """
    options = ["--model", str(model), "--heads", str(heads), "--dtype", dtype, "--port", "0"]
    options += ["--sharing-window", "0"]  # a pair that is sent twice is computed twice
    server = subprocess.Popen([sys.executable, "-m", "inward", "serve", *options], stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        for line in server.stderr:
            if '"ready"' in line:
                url = json.loads(line)["url"]
                break
        else:
            raise RuntimeError("the server did not start")
        # it logs every request, and a full pipe would stop it
        threading.Thread(target=server.stderr.read, daemon=True).start()
        asyncio.run(_call(url, pairs[:WARM_UP], callers))
        began = time.perf_counter()
        asyncio.run(_call(url, pairs, callers))
        seconds = time.perf_counter() - began
        status = Path(f"/proc/{server.pid}/status").read_text()
        peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
        return seconds, peak
    finally:
        server.terminate()
        server.wait(timeout=60)


async def _call(url: str, pairs: Sequence[Pair], callers: int) -> None:
    import httpx

    waiting = list(pairs)[::-1]

    async def caller(client: httpx.AsyncClient) -> None:
        while waiting:
            answer = await client.post("/margin", json={"pairs": [waiting.pop().body()], "truncate": True})
            answer.raise_for_status()

    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        await asyncio.gather(*(caller(client) for _ in range(callers)))


def matmul_rate(dtype: str, inner: int, outer: int) -> float:
    """This machine's best rate for one matrix product of the size of the model's feed-forward layers, in FLOP/s."""
    import torch

    a, b = torch.randn(2048, inner).to(getattr(torch, dtype)), torch.randn(outer, inner).to(getattr(torch, dtype))
    best = float("inf")
    for _ in range(30):
        began = time.perf_counter()
        torch.nn.functional.linear(a, b)
        best = min(best, time.perf_counter() - began)
    return 2 * 2048 * inner * outer / best


def _timed(run: Callable[[Sequence[Group]], None], groups: Sequence[Group]) -> float:
    run(groups[:WARM_UP])
    began = time.perf_counter()
    run(groups)
    return time.perf_counter() - began


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One way, as figures."""
    pairs = [Pair(**row) for row in json.loads(args.pairs.read_text(encoding="utf-8"))]
    groups = grouped(args.model, pairs)
    extra: dict[str, Any] = {}
    if args.way == "published":
        seconds = published(args.model, groups)
    elif args.way == "padded":
        seconds = padded(args.model, groups, dtype=args.dtype)
    elif args.way == "ours":
        seconds, extra["heads"] = ours(args.model, groups, dtype=args.dtype, heads=args.heads)
    else:
        seconds, extra["peak_bytes"] = http(args.model, pairs, dtype=args.dtype, heads=args.heads, callers=args.callers)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    tokens = text_tokens(groups)
    return {"way": args.way, "seconds": seconds, "tokens_per_second": tokens / seconds, "text_tokens": tokens,
            "needed_tokens": needed_tokens(groups), "peak_bytes": peak, **extra}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the figures of one way; ``arguments`` are the command line's where none are given."""
    parser = argparse.ArgumentParser(prog="inward.offline.bench.ways")
    parser.add_argument("way", choices=["published", "padded", "ours", "http"])
    parser.add_argument("model", type=Path)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--heads", type=Path)
    parser.add_argument("--callers", type=int, default=32)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    print(json.dumps(measure(parser.parse_args(arguments))))


if __name__ == "__main__":
    main()
