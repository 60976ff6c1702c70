"""What tests of vLLM share: tiny models with a tokenizer, groups of any ids, and how far two backbones are apart."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import transformers

from inward.types import Group, GroupReading, Ids, Position, Readout, Tap
from support import tiny_tokenizer as tiny

T = TypeVar("T")
LAYERS, WIDTH = 4, 64
TOLERANCE = 1e-3
OPTIONS = {"max_num_batched_tokens": 128, "max_num_seqs": 32, "kv_cache_memory_bytes": 8 * 2**20, "max_model_len": 640}
"""Chunked prefill, and a cache that has to evict."""
EAGER = OPTIONS | {"enforce_eager": True}
"""The same in half the time to start; ``test_vllm_compiled`` is about what vLLM compiles."""
POSITIONS: tuple[Position, ...] = ("prompt", "last", "eos", "mean")
EVERY_TAP = (
    *(Tap(layer, position) for layer in range(LAYERS + 1) for position in POSITIONS),
    Tap(LAYERS, "last", final_norm=True),
)
_RNG = np.random.default_rng(0)
EVERY_MAPPED_TAP = tuple(
    Tap(tap.layer, tap.position, _RNG.normal(size=(WIDTH, 8)).astype(np.float32), final_norm=tap.final_norm)
    for tap in EVERY_TAP
)
"""The same places and positions in numbers that are kept for cached tokens; whole states are not."""
SIZES: dict[str, Any] = {
    "vocab_size": 400, "hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 1024,
}  # fmt: skip


def save(config: type[Any], folder: Path, **more: Any) -> Path:
    """A model of this configuration with random weights, which ends some of its texts by itself."""
    torch.manual_seed(0)
    tokenizer = tiny.of_transformers()
    ends = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }
    model = transformers.AutoModelForCausalLM.from_config(config(**{**SIZES, **ends, **more}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        model.lm_head.weight[tokenizer.eos_token_id] *= 3
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def ids(rng: np.random.Generator, length: int) -> Ids:
    return tuple(rng.integers(5, 400, length).tolist())


def random_group(rng: np.random.Generator, responses: int, longest: int = 60) -> Group:
    return Group(
        ids(rng, int(rng.integers(1, 2 * longest))),
        tuple(ids(rng, int(rng.integers(0, longest))) for _ in range(responses)),
    )


def one_a_tap(taps: Sequence[Tap]) -> list[Readout]:
    return [Readout((tap,)) for tap in taps]


def worst_error(got: Sequence[GroupReading], truth: Sequence[GroupReading]) -> float:
    """The largest difference of any number, relative to the largest number of its readout and text."""
    worst = 0.0
    for one, other in zip(got, truth, strict=True):
        for reading, true in zip(one.readings, other.readings, strict=True):
            assert reading.values_NK.shape == true.values_NK.shape
            pairs = [
                *zip(reading.values_NK, true.values_NK, strict=True),
                *zip(reading.tokens_TK or (), true.tokens_TK or (), strict=True),
            ]
            worst = max([worst, *(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs if b.size)])
    return worst


def together(*work: Callable[[], Awaitable[T]]) -> list[T]:
    async def run() -> list[T]:
        return await asyncio.gather(*(one() for one in work))

    return asyncio.run(run())


def read(
    backbone: Any, groups: Sequence[Group], readouts: Sequence[Readout], *, tokens: bool = False
) -> list[GroupReading]:
    return asyncio.run(backbone.read(groups, readouts, tokens=tokens))
