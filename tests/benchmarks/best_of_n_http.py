"""Best of N through ``/rerank`` against vLLM as it comes: tokens a second, alternating, in one run.

    python tests/benchmarks/best_of_n_http.py --model smollm2 --prompts 64 --n 8 --tokens 128 --rounds 3 --out http

Bare vLLM (compiled, with nothing of ours) draws N answers to each prompt in one request; then 32 callers ask
``inward serve --backbone vllm`` for the best of N to the same prompts, the confidence of the pair included. Answers end
where they end, so what is compared is the time a token takes. A round that is in OUT.json is not run again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from fcntl import LOCK_EX, flock
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from drawn import table, write

sys.path.insert(0, str(Path(__file__).parents[1]))
from inward.backbones.loading import resolve
from inward.backbones.tokenizer import load_tokenizer
from inward.backbones.vllm.internals import AsyncEngineArgs, AsyncLLM, RequestOutputKind, SamplingParams, tokens_input
from inward.offline.data.pairs import read_prompts
from inward.processes.wiring import find_model
from inward.prompts import Prompts, Texts
from inward.settings import Settings
from support.serving import started


async def bare(engine: AsyncLLM, prompts: list[tuple[int, ...]], args: argparse.Namespace, name: str) -> float:
    """Seconds for a token."""
    params = SamplingParams(n=args.n, max_tokens=args.tokens, output_kind=RequestOutputKind.FINAL_ONLY)

    async def one(i: int, ids: tuple[int, ...]) -> int:
        outputs = [o async for o in engine.generate(tokens_input(list(ids)), params, f"{name}-{i}")]
        return sum(len(output.token_ids) for output in outputs[-1].outputs)

    began = time.perf_counter()
    drawn = await asyncio.gather(*(one(i, ids) for i, ids in enumerate(prompts)))
    return (time.perf_counter() - began) / sum(drawn)


async def served(url: str, prompts: list[Any], args: argparse.Namespace) -> float:
    """Seconds for a token, through HTTP."""
    turns = asyncio.Semaphore(args.callers)
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:

        async def one(prompt: Any) -> int:
            body = {"prompt": prompt, "n": args.n, "sampling": {"max_tokens": args.tokens}}
            async with turns:
                answer = await client.post("/rerank", json=body)
            answer.raise_for_status()
            return int(answer.json()["usage"]["drawn_tokens"])

        began = time.perf_counter()
        drawn = await asyncio.gather(*map(one, prompts))
    return (time.perf_counter() - began) / sum(drawn)


async def run(args: argparse.Namespace, url: str) -> None:
    kept = args.out.with_suffix(".json")
    rounds: list[dict[str, float]] = json.loads(kept.read_text())["rounds"] if kept.exists() else []
    model = find_model(Settings(model=args.model))
    asked = read_prompts(args.file)[: args.prompts]
    texts = Prompts(load_tokenizer(model.folder), max_tokens=1024)
    ids = [one.group.prompt_ids for one in await texts.group_many([Texts(prompt, ()) for prompt in asked])]
    arguments = {"model": str(resolve(str(model.folder))), "kv_cache_memory_bytes": 2**30, "disable_log_stats": True}
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(**{**arguments, **json.loads(args.bare_options)}, generation_config="vllm", dtype=args.dtype)
    )
    try:
        if args.lock:
            flock(os.open(args.lock, os.O_CREAT | os.O_RDWR), LOCK_EX)
        if len(rounds) < args.rounds:  # warms up
            await bare(engine, ids[:2], args, "warm")
            await served(url, asked[:2], args)
        while len(rounds) < args.rounds:
            number = len(rounds)
            both = {"bare": await bare(engine, ids, args, str(number)), "served": await served(url, asked, args)}
            rounds.append(both)
            write(args.out, {"rounds": rounds}, shown(rounds))
    finally:
        engine.shutdown()


def shown(rounds: list[dict[str, float]]) -> str:
    rows = []
    for name in ("bare", "served"):
        times = [1000 * one[name] for one in rounds]
        ratio = median(one[name] / one["bare"] for one in rounds)
        rows.append([name, f"{median(times):.3f}", f"{min(times):.3f} to {max(times):.3f}", f"{ratio:.3f}"])
    return table(["way", "ms a token (median)", "spread", "x bare (median of rounds)"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--file", type=Path, required=True, help="rows with a prompt")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--callers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vllm-options", default="{}", help="of the service, as JSON")
    parser.add_argument("--bare-options", default="{}", help="of the other engine, as JSON")
    parser.add_argument("--lock", type=Path, help="file that only one of several such runs holds while it measures")
    parser.add_argument("--out", type=Path, required=True, help="results: OUT.json and OUT.md")
    args = parser.parse_args()
    options = ("--backbone", "vllm", "--vllm-options", args.vllm_options)
    with started("--model", args.model, "--dtype", args.dtype, *options) as server:
        asyncio.run(run(args, server.url))


if __name__ == "__main__":
    main()
