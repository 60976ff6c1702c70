"""What benchmarks of drawing share: a backbone with its heads, answers that are drawn once and kept, and results."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inward.backbones.base import Backbone
from inward.errors import InwardError
from inward.heads.base import Head
from inward.heads.registry import Registry, Snapshot
from inward.heads.running import token_scores
from inward.offline.data.pairs import read_prompts
from inward.processes.wiring import find_model, heads_folder, open_backbone, open_prompts
from inward.prompts import Prompts, Texts
from inward.settings import Settings
from inward.types import Group, SamplingSpec

Doubles = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Opened:
    """A backbone, its prompts and its heads."""

    backbone: Backbone
    prompts: Prompts
    heads: Snapshot

    async def groups(self, file: Path, count: int, room: int) -> list[Group]:
        """The first ``count`` prompts of a file that leave ``room`` tokens."""
        texts = [Texts(prompt, ()) for prompt in read_prompts(file)]
        found = [one.group for one in await self.prompts.group_many(texts) if not isinstance(one, InwardError)]
        return [g for g in found if len(g.prompt_ids) + room < self.backbone.info.max_tokens][:count]


@dataclass(frozen=True, slots=True)
class Answers:
    """``n`` answers to one prompt, drawn to their end: final score and score at every token by each head."""

    ids: list[tuple[int, ...]]
    final: dict[str, Doubles]
    tokens: dict[str, list[Doubles]]


def arguments(about: str | None) -> argparse.ArgumentParser:
    """Options that all of them have."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--heads", type=Path, help="folder of heads (default: those of the model)")
    parser.add_argument("--backbone", default="transformers")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--vllm-options", type=json.loads, default={})
    parser.add_argument("--tokens", type=int, default=128, help="of an answer at most (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--work", type=Path, required=True, help="folder for what is drawn: the same command goes on")
    parser.add_argument("--out", type=Path, required=True, help="results: OUT.json and OUT.md")
    return parser


@asynccontextmanager
async def opened(args: argparse.Namespace) -> AsyncIterator[Opened]:
    """By ``arguments``."""
    settings = Settings(
        model=args.model, heads=args.heads, backbone=args.backbone, dtype=args.dtype, vllm_options=args.vllm_options
    )
    model = find_model(settings)
    backbone = await asyncio.to_thread(open_backbone, settings, model)
    try:
        prompts = open_prompts(settings, model, backbone.info.max_tokens)
        folder = heads_folder(settings)
        registry = Registry.open(folder, info=backbone.info, template=prompts.template)
        yield Opened(backbone, prompts, registry.snapshot())
    finally:
        await backbone.close()


def sampling(args: argparse.Namespace, n: int, seed: int) -> SamplingSpec:
    """By ``arguments``."""
    return SamplingSpec(n, max_tokens=args.tokens, temperature=args.temperature, top_p=args.top_p, seed=seed)


async def answers(at: Opened, group: Group, heads: Sequence[Head], work: Path) -> Answers:
    """Drawn, or found in ``work``."""
    what = repr((group, [head.ref for head in heads], at.backbone.info.identity))
    kept = work / f"{hashlib.sha256(what.encode()).hexdigest()[:32]}.json"
    if not kept.exists():
        samples, reading = await at.backbone.sample_and_read(group, [head.readout for head in heads], tokens=True)
        found: dict[str, Any] = {"ids": [sample.ids for sample in samples], "final": {}, "tokens": {}}
        for head, own in zip(heads, reading.readings, strict=True):
            found["final"][head.ref.name] = head.score(own).scores_N
            given = {n: values for n, values in enumerate(own.tokens_TK or ()) if len(values)}
            scores = token_scores(head, given)
            found["tokens"][head.ref.name] = [scores.get(n, np.zeros(0)).tolist() for n in range(len(samples))]
        _keep(found, kept)
    read = json.loads(kept.read_text())
    final = {name: np.array([np.nan if s is None else s for s in row]) for name, row in read["final"].items()}
    tokens = {name: [np.array(scores) for scores in rows] for name, rows in read["tokens"].items()}
    return Answers([tuple(ids) for ids in read["ids"]], final, tokens)


def _keep(found: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text(json.dumps(found))
    path.with_suffix(".part").replace(path)


async def many(at: Opened, groups: Sequence[Group], heads: Sequence[Head], work: Path) -> list[tuple[Group, Answers]]:
    """``answers`` to each, a few prompts at a time; those with an answer that has no score are left out."""
    turns = asyncio.Semaphore(min(max(at.backbone.capacity.concurrency, 2), 64))

    async def one(i: int, group: Group) -> Answers:
        async with turns:
            found = await answers(at, group, heads, work)
            print(f"\r{i + 1} of {len(groups)} prompts", end="", flush=True)
            return found

    found = await asyncio.gather(*map(one, range(len(groups)), groups))
    print()
    pairs = zip(groups, found, strict=True)
    return [(group, one) for group, one in pairs if all(np.isfinite(scores).all() for scores in one.final.values())]


def interval(values_P: Doubles) -> tuple[float, float, float]:
    """Mean, and its 95 % interval, over prompts."""
    rng = np.random.default_rng(0)
    resampled = np.asarray(values_P)[rng.integers(0, len(values_P), (1000, len(values_P)))].mean(axis=1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(np.mean(values_P)), float(low), float(high)


def shown(estimate: Sequence[float]) -> str:
    """An estimate in a table."""
    mean, low, high = estimate
    return f"{mean:.2f} ({low:.2f} to {high:.2f})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write(out: Path, results: dict[str, Any], text: str) -> None:
    """``OUT.json`` and ``OUT.md``."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(results, indent=1))
    out.with_suffix(".md").write_text(text)
    print(text)
