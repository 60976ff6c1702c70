"""Two hundred callers of ``/rerank`` and ``/score`` at once on ``inward serve --backbone vllm``; then its engine is
killed.

    python tests/benchmarks/mixed_load.py --seconds 300 --callers 200 --out load
    python tests/benchmarks/mixed_load.py --seconds 300 --callers 32 --model smollm2 --prompts PAIRS.jsonl

Of the answers that are drawn some are drawn with early rejection, some with a guard, some with both. Watched: errors,
whether each answer belongs to its question (every score is compared with that of the same text alone, before or after
the load; what a guard let pass must be without an unsafe token), memory of all processes, how long callers wait once
the engine is killed, and whether a restart serves again.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
from drawn import table
from drawn import write as write_results

from inward.backbones.fingerprint import fingerprint
from inward.offline.bench.workload import write_random_heads
from inward.offline.data.pairs import read_prompts
from inward.prompts import Prompts
from inward.types import BackboneInfo
from support.serving import Served, serve, started
from support.tiny_tokenizer import TEXTS
from support.tiny_tokenizer import of_transformers as tokenizer

LAYERS, WIDTH = 4, 64
Prompt = str | list[dict[str, Any]]


def write(folder: Path) -> None:
    """A tiny model of which vLLM has a kernel for the size of its attention heads, and a LEGEND head."""
    import torch
    import transformers

    torch.manual_seed(0)
    tok = tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tok), hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=1024, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    tok.save_pretrained(folder / "model")
    info = BackboneInfo("model", "", fingerprint(folder / "model"), LAYERS, WIDTH, 1024, "float32", "cpu")
    write_random_heads(info, Prompts(tok, max_tokens=1024).template, folder / "heads", 2)


@dataclass(frozen=True)
class Questions:
    """A fixed list of 120: texts to score, candidates to rank, and answers to draw."""

    heads: tuple[str, str]
    """What ranks, and what guards."""
    prompts: Sequence[Prompt] = ()
    """Of a file, all of which are to be answered; none: made up, of all three kinds."""
    n: int = 4
    tokens: int = 48

    def __call__(self, i: int) -> dict[str, Any]:
        """The ``i``-th."""
        rng = random.Random(i)
        prompt: Prompt = f"Question {i}: " + " ".join(rng.choices(TEXTS, k=rng.randint(1, 3)))
        answers = [" ".join(rng.choices(TEXTS, k=rng.randint(1, 3))) + f" ({i}.{k})" for k in range(4)]
        kind = i % 3
        if self.prompts:
            prompt, kind = self.prompts[i % len(self.prompts)], 2
        if kind == 0:
            return {"items": [{"prompt": prompt, "response": answers[0]}], "head": self.heads[0]}
        if kind == 1:
            return {"prompt": prompt, "head": self.heads[0], "candidates": answers}
        draw: dict[str, Any] = {"n": self.n, "sampling": {"max_tokens": self.tokens}, "return_token_ids": True}
        if i % 2:
            draw["early_rejection"] = {"keep": 0.5, "at": [8, 16]}
        if i % 4 > 1:
            draw["stop_when"] = GUARD
        return {"prompt": prompt, "head": self.heads[0]} | draw


GUARD: dict[str, Any] = {"below": 0.0, "pool": "last"}
"""Its head, and what it stops below, are set before the load, so that some answers are stopped and some are not."""


def said(answer: dict[str, Any]) -> list[float]:
    """The scores of an answer, in the order of what was given."""
    if "scores" in answer:
        return [answer["scores"][0]["score"]]
    return [result["score"] for result in sorted(answer["results"], key=lambda r: r["index"])]


def near(a: list[float], b: list[float]) -> bool:
    return len(a) == len(b) and all(abs(x - y) <= 1e-3 * max(1, abs(y)) for x, y in zip(a, b, strict=True))


async def safe(ask: Any, body: dict[str, Any], answer: dict[str, Any]) -> list[str]:
    """Whether no token that was given is unsafe, by the guard's own head."""
    given = [result for result in answer["results"] if result["token_ids"] and result["finish_reason"] != "rejected"]
    items = [{"prompt": body["prompt"], "response_ids": result["token_ids"]} for result in given]
    if not items:
        return []
    again = await ask({"items": items, "head": GUARD["head"], "detail": ["tokens"]})
    lowest = [min(score["tokens"]) for score in again.json()["scores"]]
    return ["guarded: safe" if low >= GUARD["below"] - 1e-3 else "guarded: UNSAFE" for low in lowest]


def memory(server: Served) -> float:
    """MiB, shared pages counted once (proportional set size), of the server and vLLM's processes."""
    process = psutil.Process(server.process.pid)
    return sum(p.memory_full_info().pss for p in (process, *process.children(recursive=True))) / 2**20


async def load(server: Served, args: argparse.Namespace, question: Questions) -> None:
    GUARD["head"] = question.heads[1]
    limits = httpx.Limits(max_connections=args.callers + 8)
    async with httpx.AsyncClient(base_url=server.url, timeout=args.patience, limits=limits) as client:

        async def ask(body: dict[str, Any]) -> httpx.Response:
            return await client.post("/score" if "items" in body else "/rerank", json=body)

        first = (await ask(question(8) | {"stop_when": None, "early_rejection": None})).json()["results"]
        texts = [{"prompt": question(8)["prompt"], "response_ids": one["token_ids"]} for one in first]
        read = await ask({"items": texts, "head": GUARD["head"], "detail": ["tokens"]})
        tokens = [number for score in read.json()["scores"] for number in score["tokens"]]
        GUARD["below"] = float(np.quantile(tokens, 0.02))
        given = [i for i in range(120) if "n" not in question(i)]
        truth = {i: said((await ask(question(i))).json()) for i in given}
        outcomes: Counter[str] = Counter()
        drawn: list[tuple[dict[str, Any], dict[str, Any]]] = []
        waits: list[float] = []
        sizes: list[tuple[float, float]] = []
        numbers = itertools.cycle(range(120))
        end = time.monotonic() + args.seconds

        async def caller() -> None:
            while time.monotonic() < end:
                i = next(numbers)
                body, began = question(i), time.monotonic()
                response = await ask(body)
                waits.append(time.monotonic() - began)
                if response.status_code != 200:
                    outcomes[f"{response.status_code} {response.text[:80]}"] += 1
                elif "n" in body:
                    outcomes["drawn"] += 1
                    outcomes.update(f"drawn: {result['finish_reason']}" for result in response.json()["results"])
                    drawn.append((body, response.json()))
                else:
                    outcomes["right" if near(said(response.json()), truth[i]) else "WRONG"] += 1

        async def watch() -> None:
            while time.monotonic() < end:
                sizes.append((args.seconds - (end - time.monotonic()), await asyncio.to_thread(memory, server)))
                await asyncio.sleep(args.seconds / 12)

        await asyncio.gather(watch(), *(caller() for _ in range(args.callers)))
        for body, answer in random.Random(0).sample(drawn, min(len(drawn), 60)):
            results = [result for result in answer["results"] if result["finish_reason"] in ("stop", "length")]
            if "stop_when" in body:
                outcomes.update(await safe(ask, body, answer))
            if not results:
                continue
            items = [{"prompt": body["prompt"], "response_ids": result["token_ids"]} for result in results]
            again = await ask({"items": items, "head": question.heads[0]})
            for result, score in zip(results, again.json()["scores"], strict=True):
                outcomes[
                    "drawn: same score given" if near([result["score"]], [score["score"]]) else "drawn: WRONG"
                ] += 1
        waits.sort()
        result = {
            "outcomes": dict(outcomes), "memory_mib": sizes, "callers": args.callers,
            "seconds": {"median": waits[len(waits) // 2], "p99": waits[int(len(waits) * 0.99)], "most": waits[-1]},
        }  # fmt: skip
        if args.out:
            rows = [[name, str(count)] for name, count in sorted(outcomes.items())]
            write_results(args.out, result, table(["outcome", "times"], rows))
        print(f"outcomes: {dict(outcomes)}")
        print(
            f"seconds to answer: median {waits[len(waits) // 2]:.2f}, 99 % {waits[int(len(waits) * 0.99)]:.2f}, most "
            f"{waits[-1]:.2f}"
        )
        print("memory in MiB after seconds: " + ", ".join(f"{at:.0f}: {size:.0f}" for at, size in sizes))


async def kill(server: Served, question: Questions) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        calls = [
            asyncio.create_task(client.post("/rerank", json=question(2) | {"n": 8, "sampling": {"max_tokens": 600}}))
            for _ in range(20)
        ]
        await asyncio.sleep(1.5)
        [engine] = [
            p
            for p in psutil.Process(server.process.pid).children()
            if "EngineCore" in " ".join([p.name(), *p.cmdline()])
        ]
        engine.kill()
        began = time.monotonic()
        answers = await asyncio.gather(*calls)
        print(f"killed: {Counter(a.status_code for a in answers)} after {time.monotonic() - began:.1f} s; ", end="")
        print(
            f"/livez {(await client.get('/livez')).status_code}, /readyz {(await client.get('/readyz')).status_code}, ",
            end="",
        )
        print(f"the next call {(await client.post('/score', json=question(0))).status_code}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--callers", type=int, default=200)
    parser.add_argument("--out", type=Path, help="results: OUT.json and OUT.md")
    parser.add_argument("--backbone", default="vllm")
    parser.add_argument("--model", help="with its own heads and --prompts, instead of a tiny one of random weights")
    parser.add_argument("--prompts", type=Path, help="prompts that are all drawn for")
    parser.add_argument("--questions", type=int, default=120, help="of --prompts (default: %(default)s)")
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--patience", type=float, default=100, help="seconds a caller waits (default: %(default)s)")
    args = parser.parse_args()
    if bool(args.model) != bool(args.prompts):
        parser.error("--model and --prompts go together")
    options = ("--backbone", args.backbone, "--dtype", "float32", "--max-candidates", "16")
    if args.model:
        prompts = [
            prompt if isinstance(prompt, str) else list(prompt)
            for prompt in read_prompts(args.prompts)[: args.questions]
        ]
        environment = {"INWARD_TIMEOUT": str(args.patience)}
        with started("--model", args.model, *options, env=environment) as server:
            asyncio.run(load(server, args, Questions(("hybrid", "legend"), prompts, args.n, args.tokens)))
        return
    question = Questions(("bench-0", "bench-1"), n=args.n, tokens=args.tokens)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        with serve(folder, *options) as server:
            asyncio.run(load(server, args, question))
            if args.backbone != "vllm":
                return
            asyncio.run(kill(server, question))
            print(f"stopped with {server.stop(timeout=90)}")
        with serve(folder, *options) as server:
            print(f"after a restart: {httpx.post(server.url + '/rerank', json=question(2), timeout=60).status_code}")
            print(f"stopped with {server.stop(timeout=90)}")


if __name__ == "__main__":
    main()
