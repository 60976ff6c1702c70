"""What is measured on: a model folder, pairs of token ids, heads."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from inward.backbones.base import Backbone
from inward.batching import within
from inward.heads import store
from inward.heads.base import BackboneRef, Manifest
from inward.heads.legend import LegendHead
from inward.heads.pooling import TRAINED, Pool
from inward.offline.data.pairs import Pair, read_pairs
from inward.types import BackboneInfo, Floats, Group

SHAPES = {
    "qwen2-0.5b": {
        "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "qwen2-tiny": {
        "model_type": "qwen2", "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8192, "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
"""Shapes to fill with random weights: speed does not depend on what the weights are."""


def read_texts(path: Path | None, n: int) -> list[Pair]:
    """``n`` pairs, spread over a file; without one, made-up words with the lengths of HH's harmless pairs."""
    if path is not None:
        pairs = read_pairs(path)
        return [pairs[i] for i in np.linspace(0, len(pairs) - 1, min(n, len(pairs))).astype(int)]
    rng = np.random.default_rng(0)
    words = (
        "the of a to and what is how can you it that for on are with as they be at this have from or had by not"
    ).split()

    def text(mean: float) -> str:
        return " ".join(rng.choice(words, size=max(3, int(rng.lognormal(np.log(mean), 0.6)))))

    return [Pair(text(90), text(40), text(40)) for _ in range(n)]


def write_random_model(shape: str, folder: Path, tokenizer: Path) -> None:
    """A model of a known shape with random weights, and somebody's tokenizer, in ``folder``."""
    import shutil

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    values = dict(SHAPES[shape])
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for path in tokenizer.iterdir():
        if path.suffix in (".json", ".jinja") and path.name not in ("config.json", "generation_config.json"):
            shutil.copy(path, folder)


def write_random_heads(info: BackboneInfo, template: str, folder: Path, n: int, pool: str | None = None) -> None:
    """``n`` LEGEND heads with random directions at layers spread over the backbone, the first at its last layer.

    Args:
        pool: of every head, as ``inward fit --pool`` takes it; a trained one gets a random map.
    """
    rng = np.random.default_rng(0)
    for i in range(n):
        layer = info.layers - (i * info.layers // max(n, 1)) % info.layers
        direction: Floats = rng.normal(size=info.width).astype(np.float32)
        manifest = Manifest(
            name=f"bench-{i}", kind="legend", version=1, created=datetime.now(UTC).isoformat(timespec="seconds"),
            backbone=BackboneRef.of(info),
            layers=(layer,), position="last", template=template, pool=pool and Pool.parse(pool, layer=layer),
            calibration={"margin_std": 1.0, "bin_edges": [0.3, 0.6, 1.0], "bin_values": [0.0, 1 / 3, 2 / 3, 1.0]},
        )  # fmt: skip
        tensors = {"direction": direction / np.linalg.norm(direction)}
        if manifest.pool and manifest.pool.name in TRAINED:
            weight: Floats = (rng.normal(size=info.width) / info.width).astype(np.float32)
            tensors |= {"pool_weight": weight, "pool_bias": np.zeros(1, dtype=np.float32)}
        store.save(LegendHead.from_tensors(manifest, tensors), folder / f"bench-{i}")


def text_tokens(groups: Sequence[Group]) -> int:
    """Tokens of all texts, prompt + response each: what every way of scoring them is charged with."""
    return sum(len(g.prompt_ids) * len(g.responses_ids) + sum(map(len, g.responses_ids)) for g in groups)


def needed_tokens(groups: Sequence[Group]) -> int:
    """Tokens that have to be computed: each prompt once."""
    return sum(len(g.prompt_ids) + sum(map(len, g.responses_ids)) for g in groups)


def in_batches(backbone: Backbone, groups: Sequence[Group]) -> list[list[Group]]:
    """Groups in batches of the backbone's capacity, long ones together."""
    longest_first = sorted(groups, key=lambda group: -group.tokens)
    return list(within(longest_first, backbone.capacity.tokens, lambda group: group.tokens))
