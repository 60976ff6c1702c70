"""What a reward costs, three ways: the head alone, with a forward pass, and everything with generation; beside a reward
model of the backbone's own size, as an online RLHF loop would run it. One run, one process, the same answers for both.

    python tests/benchmarks/reward_cost.py --prompts PAIRS.jsonl --out cost.json

The reward model is the backbone with a scalar on top (Hugging Face's AutoModelForSequenceClassification), in the
backbone's dtype, in length-sorted batches of eight. Times are medians of ``--repeats`` in milliseconds an answer, taken
in turns. Operations are counted: two for each weight and token of the blocks, and in attention four for each pair of
tokens, layer and width; a head's are its matrices.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification

from inward.backbones.base import Backbone
from inward.errors import InwardError
from inward.heads.base import Head
from inward.heads.registry import Registry
from inward.processes.wiring import find_model, heads_folder, open_backbone, open_prompts
from inward.prompts import Texts
from inward.settings import Settings
from inward.types import Group, Ids, Reading, SamplingSpec

BATCH = 8


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    settings = Settings(model=args.model, heads=args.heads, backbone=args.backbone, dtype=args.dtype)
    model = find_model(settings)
    backbone = await asyncio.to_thread(open_backbone, settings, model)
    try:
        prompts = open_prompts(settings, model, backbone.info.max_tokens)
        registry = Registry.open(heads_folder(settings), info=backbone.info, template=prompts.template)
        head = registry.resolve(args.head)
        rows = [json.loads(line)["prompt"] for line in args.prompts.read_text(encoding="utf-8").splitlines()]
        texts = [Texts(prompt, ()) for prompt in dict.fromkeys(rows) if len(prompt) < 600][: args.count]
        asked = [g.group.prompt_ids for g in await prompts.group_many(texts) if not isinstance(g, InwardError)]
        return await _compared(args, backbone, head, asked, RewardModel(str(model.folder), backbone.info.dtype))
    finally:
        await backbone.close()


class RewardModel:
    """A reward model of the backbone's own size; what it says is of no matter here."""

    def __init__(self, path: str, dtype: str) -> None:
        self.model = AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=1, dtype=getattr(torch, dtype)
        ).eval()
        self.model.config.pad_token_id = self.model.config.pad_token_id or 0
        inner = self.model.base_model
        self.block_weights = sum(p.numel() for name, p in inner.named_parameters() if "embed_tokens" not in name)
        self.layers, self.width = self.model.config.num_hidden_layers, self.model.config.hidden_size

    @torch.inference_mode()
    def __call__(self, rows: Sequence[Ids]) -> None:
        ordered = sorted(rows, key=len)
        for start in range(0, len(ordered), BATCH):
            part = ordered[start : start + BATCH]
            width = max(map(len, part))
            ids_BT = torch.tensor([row + (0,) * (width - len(row)) for row in part])
            mask_BT = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in part])
            self.model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)

    def operations(self, tokens: int) -> float:
        """Of one text, without padding."""
        return 2.0 * self.block_weights * tokens + 4.0 * self.layers * self.width * tokens * tokens / 2


async def _compared(
    args: argparse.Namespace, backbone: Backbone, head: Head, asked: Sequence[Ids], rm: RewardModel
) -> dict[str, Any]:
    spec = SamplingSpec(args.n, max_tokens=args.tokens, temperature=1.0, top_p=0.95, seed=1)
    to_draw = [Group(ids, sampling=spec) for ids in asked]
    drawn = [await backbone.sample(group) for group in to_draw]
    groups = [Group(ids, tuple(sample.ids for sample in samples)) for ids, samples in zip(asked, drawn, strict=True)]
    rows = [group.prompt_ids + ids for group in groups for ids in group.responses_ids]
    taps = [tap for tap in head.readout.taps if tap.weight_DK is not None and tap.bias_K is not None]
    states = [np.ones((len(rows), len(tap.weight_DK)), np.float32) for tap in taps]

    async def alone() -> None:
        parts = [h @ tap.weight_DK + tap.bias_K for h, tap in zip(states, taps, strict=True)]
        head.score(Reading(np.concatenate(parts, axis=1)))

    async def forward() -> None:
        await backbone.read(groups, [head.readout])

    async def forward_rm() -> None:
        await asyncio.to_thread(rm, rows)

    async def generation() -> None:
        for group in to_draw:
            await backbone.sample_and_read(group, [head.readout])

    async def generation_only() -> None:
        for group in to_draw:
            await backbone.sample(group)

    async def generation_rm() -> None:
        for group in to_draw:
            samples = await backbone.sample(group)
            await asyncio.to_thread(rm, [group.prompt_ids + sample.ids for sample in samples])

    ways = {
        "head alone, states given": alone, "head and forward": forward, "reward model, forward": forward_rm,
        "generation without reward": generation_only, "generation and head": generation,
        "generation and reward model": generation_rm,
    }  # fmt: skip
    return {
        "model": backbone.info.name, "dtype": backbone.info.dtype, "device": backbone.info.device,
        "head": head.ref.name,
        "answers": len(rows), "tokens": statistics.fmean(map(len, rows)),
        "milliseconds": await _timed(ways, args.repeats, len(rows)),
        "operations": {
            "head": 2.0 * sum(tap.weight_DK.size for tap in taps) + 2.0 * len(taps) ** 2,
            "reward model": statistics.fmean(rm.operations(len(row)) for row in rows),
        },
    }  # fmt: skip


async def _timed(ways: dict[str, Callable[[], Awaitable[None]]], repeats: int, answers: int) -> dict[str, float]:
    """Median milliseconds an answer, the ways in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            await way()
            seconds[name].append(time.perf_counter() - began)
    return {name: 1000 * statistics.median(times[1:]) / answers for name, times in seconds.items()}


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    ms, operations = result["milliseconds"], result["operations"]
    lines = ["| an answer costs | our head | reward model of the same size | ratio |", "|---|---|---|---|"]

    def line(what: str, ours: float, theirs: float, unit: str) -> None:
        lines.append(f"| {what} | {ours:.4g} {unit} | {theirs:.4g} {unit} | {theirs / ours:.3g} |")

    line(
        "head alone, states given; reward model's forward pass",
        ms["head alone, states given"],
        ms["reward model, forward"],
        "ms",
    )
    line("the same, operations", operations["head"], operations["reward model"], "")
    line("with a forward pass", ms["head and forward"], ms["reward model, forward"], "ms")
    line("everything, with generation", ms["generation and head"], ms["generation and reward model"], "ms")
    without = ms["generation without reward"]
    line(
        "of that, the reward's part",
        ms["generation and head"] - without,
        ms["generation and reward model"] - without,
        "ms",
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--heads", type=Path)
    parser.add_argument("--backbone", default="transformers")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--head", default="hybrid")
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL with a field prompt")
    parser.add_argument("--count", type=int, default=32, help="prompts (default: %(default)s)")
    parser.add_argument("--n", type=int, default=8, help="answers of each (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="most tokens of an answer (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="also write the result as JSON")
    args = parser.parse_args()
    result = asyncio.run(measure(args))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    print(table(result))


if __name__ == "__main__":
    main()
