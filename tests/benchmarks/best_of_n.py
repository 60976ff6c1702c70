"""What ranking costs on top of sampling: best-of-n by vLLM alone, and with every sample read, in one run.

    python tests/benchmarks/best_of_n.py [--model MODEL] --prompts 64 --n 8 --tokens 128

Ways, in turn, each round with prompts of its own: (a) vLLM as it comes, in an engine of its own without anything of
ours; (b) our engine samples, nothing is read; (c) read in the pass that samples, position ``last``; (d) the same with
position ``eos``; (e) sample, then submit each sample again to be read; (f) what one does without a service: a second
process with its own copy of the model runs transformers with ``output_hidden_states=True`` on each sample. Samples have
exactly ``--tokens`` tokens, so that all ways do the same work. Then tokens computed for a prompt and its candidates.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from fcntl import LOCK_EX, flock
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch

from inward.backbones.loading import resolve
from inward.backbones.vllm.backbone import VllmBackbone
from inward.backbones.vllm.generation import Generation
from inward.backbones.vllm.internals import AsyncEngineArgs, AsyncLLM, RequestOutputKind, SamplingParams, tokens_input
from inward.backbones.vllm.layout import ColumnTable
from inward.backbones.vllm.protocol import INSTALL
from inward.types import Group, Position, Readout, Sample, SamplingSpec, Tap

WAYS = {
    "bare": "(a) vLLM as it comes samples",
    "silent": "(b) our engine samples, nothing is read",
    "last": "(c) read in the pass that samples, position last",
    "eos": "(d) the same, position eos",
    "again": "(e) sampled, then submitted again",
    "second": "(f) sampled, then scored one by one by transformers in a second process",
}


def cpu_seconds() -> float:
    """Of this process and those below it. Not vLLM's engine core, which spins while it waits."""
    own = psutil.Process()
    counted = [
        p for p in (own, *own.children(recursive=True)) if "EngineCore" not in " ".join([p.name(), *p.cmdline()])
    ]
    return sum(sum(p.cpu_times()[:2]) for p in counted)


class Second:
    """Lives in the second process."""

    model: Any

    @classmethod
    def load(cls, folder: Path, dtype: str) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        cls.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

    @classmethod
    def score(cls, texts: list[tuple[int, ...]]) -> list[float]:
        with torch.inference_mode():
            states = [cls.model(torch.tensor([text]), output_hidden_states=True).hidden_states for text in texts]
        return [float(sum(layer[0, -1].float().sum() for layer in layers)) for layers in states]

    @staticmethod
    def memory() -> float:
        """MiB."""
        return float(psutil.Process().memory_full_info().uss / 2**20)


@cache
def readouts(backbone: VllmBackbone, position: Position) -> list[Readout]:
    """A LEGEND head (one number of the last layer), a hybrid head (one number a layer) and an SRR head (64 numbers
    of a middle one)."""
    rng = np.random.default_rng(0)
    L, D = backbone.info.layers, backbone.info.width

    def tap(layer: int, K: int) -> Tap:
        return Tap(layer, position, rng.normal(size=(D, K)).astype(np.float32))

    return [
        Readout((tap(L, 1),)),
        Readout(tuple(tap(layer, 1) for layer in range(1, L + 1))),
        Readout((tap(max(1, L // 4), 64),)),
    ]


class Endless(Generation):
    """Draws as many tokens as are asked for, whatever they are."""

    def _params(self, *args: Any, **options: Any) -> SamplingParams:
        params = super()._params(*args, **options)
        params.ignore_eos, params.stop_token_ids, params._all_stop_token_ids = True, [], set()
        return params

    def _finished(self, drawn: Sequence[int], spec: SamplingSpec) -> Sample:
        return Sample(tuple(drawn[: spec.max_tokens]), "", "length")


class Bare:
    """vLLM as it comes: nothing of ours is in it, and one request draws all samples of a prompt."""

    def __init__(self, folder: Path, dtype: str, options: dict[str, Any]) -> None:
        cache = {"kv_cache_memory_bytes": 2**30, "generation_config": "vllm", "disable_log_stats": True}
        self._engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(**(cache | options | {"model": str(folder), "dtype": dtype}))
        )
        self._requests = 0

    async def sample(self, group: Group) -> None:
        spec = group.sampling
        assert spec is not None
        params = SamplingParams(
            n=spec.n, max_tokens=spec.max_tokens, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY
        )
        self._requests += 1
        async for _ in self._engine.generate(tokens_input(list(group.prompt_ids)), params, f"bare-{self._requests}"):
            pass

    def close(self) -> None:
        self._engine.shutdown()


async def silence(backbone: VllmBackbone) -> None:
    """Nobody reads anything any more."""
    backbone._table = ColumnTable(layers=backbone.info.layers, width=backbone.info.width)
    await backbone._engine.call(lambda: backbone._engine.rpc(INSTALL, [], []))


async def once(
    backbone: VllmBackbone, bare: Bare | None, way: str, groups: list[Group], pool: ProcessPoolExecutor | None
) -> None:
    heads = readouts(backbone, "eos" if way == "eos" else "last")
    ways: dict[str, Callable[[Group], Awaitable[object]]] = {
        "bare": bare.sample if bare is not None else backbone.sample,
        "silent": backbone.sample,
        "last": lambda group: backbone.sample_and_read(group, heads),
        "eos": lambda group: backbone.sample_and_read(group, heads),
    }

    async def again(group: Group) -> None:
        samples = await backbone.sample(group)
        await backbone.read([Group(group.prompt_ids, tuple(sample.ids for sample in samples))], heads)

    async def second(group: Group) -> None:
        samples = await backbone.sample(group)
        texts = [group.prompt_ids + sample.ids for sample in samples]
        await asyncio.get_running_loop().run_in_executor(pool, Second.score, texts)

    ways |= {"again": again, "second": second}
    await asyncio.gather(*(ways[way](group) for group in groups))


async def run(args: argparse.Namespace) -> dict[str, object]:
    options = (
        {"block_size": args.block_size, **json.loads(args.vllm_options)}
        if args.block_size
        else json.loads(args.vllm_options)
    )
    backbone = await asyncio.to_thread(
        VllmBackbone, resolve(args.model), name="bench", dtype=args.dtype, options=options
    )
    generation = backbone._generation
    backbone._generation = Endless(
        generation._engine, generation._tokenizer, generation.end_ids, sessions=generation.sessions
    )
    bare = (
        Bare(resolve(args.model), backbone.info.dtype, json.loads(args.bare_options)) if "bare" in args.ways else None
    )
    loading = (resolve(args.model), backbone.info.dtype)
    pool = ProcessPoolExecutor(1, get_context("spawn"), Second.load, loading) if "second" in args.ways else None
    memory = {"second process": pool.submit(Second.memory).result()} if pool is not None else {}
    rng = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {way: [] for way in args.ways}
    cpu: dict[str, list[float]] = {way: [] for way in args.ways}

    def groups() -> list[Group]:
        spec = SamplingSpec(args.n, max_tokens=args.tokens)
        return [Group(tuple(rng.integers(100, 4000, args.prompt).tolist()), sampling=spec) for _ in range(args.prompts)]

    try:
        if args.lock:
            flock(os.open(args.lock, os.O_CREAT | os.O_RDWR), LOCK_EX)
        for round_ in range(args.rounds + 1):  # the first warms up
            for way in args.ways:
                await silence(backbone)
                if way not in ("bare", "silent", "second"):
                    await backbone.read([Group((1, 2), ((3,),))], readouts(backbone, "eos" if way == "eos" else "last"))
                began, before = time.perf_counter(), cpu_seconds()
                await once(backbone, bare, way, groups() if round_ else groups()[:4], pool)
                if round_:
                    seconds[way].append(time.perf_counter() - began)
                    cpu[way].append(cpu_seconds() - before)
                    print(f"{way}: {seconds[way][-1]:.2f} s, CPU {cpu[way][-1]:.2f} s", flush=True)
        prompt = tuple(rng.integers(100, 4000, 512).tolist())
        group = Group(prompt, tuple(tuple(rng.integers(100, 4000, args.tokens).tolist()) for _ in range(8)))
        (reading,) = await backbone.read([group], readouts(backbone, "last"))
        if pool is not None:
            memory["second process"] = pool.submit(Second.memory).result()
    finally:
        if pool is not None:
            pool.shutdown()
        if bare is not None:
            bare.close()
        await backbone.close()
    needed = 512 + 8 * args.tokens
    first = args.ways[0]
    return {
        "compiled": backbone._engine.compiled,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "memory": memory,
        "ratio": {way: median(seconds[way]) / median(seconds[first]) for way in args.ways},
        "cpu_ratio": {way: median(cpu[way]) / median(cpu[first]) for way in args.ways},
        "candidates": {
            "computed": reading.computed_tokens,
            "needed": needed,
            "ratio": reading.computed_tokens / needed,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a sample (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=WAYS,
        default=list(WAYS),
        help="the first is what others are compared with (default: all)",
    )
    parser.add_argument("--block-size", type=int)
    parser.add_argument("--vllm-options", default="{}")
    parser.add_argument("--bare-options", default="{}", help="of the engine without anything of ours, as JSON")
    parser.add_argument("--lock", type=Path, help="file that only one of several such runs holds while it measures")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    result = asyncio.run(run(args))
    print("\n| way | seconds (median) | x (a) | CPU seconds | x (a) |\n|---|---|---|---|---|")
    for way in args.ways:
        clock, used = median(result["seconds"][way]), median(result["cpu_seconds"][way])
        print(
            f"| {WAYS[way]} | {clock:.2f} | {result['ratio'][way]:.3f} | {used:.2f} | {result['cpu_ratio'][way]:.3f} |"
        )
    print(f"\nA prompt of 512 tokens with 8 candidates of {args.tokens}: {result['candidates']}")
    print(f"Memory of its own (MiB): {result['memory']}")
    if args.out:
        args.out.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
