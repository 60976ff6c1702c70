"""What a model's configuration says about the texts that it takes."""

from __future__ import annotations

from typing import Any

_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
UNSTATED_TOKENS = 2048
"""Taken where neither configuration nor tokenizer states a limit."""


def max_tokens(config: Any, tokenizer: Any) -> int:
    """The longest text that the model takes, in tokens.

    Args:
        config: a Hugging Face (text) configuration.
    """
    stated = next((limit for name in _NAMES if (limit := getattr(config, name, None))), None)
    known = [
        int(limit) for limit in (stated, _rope_limit(config), tokenizer.model_max_length) if limit and limit < 10**9
    ]
    return min(known, default=UNSTATED_TOKENS)  # a tokenizer without a limit states 1e30


def _rope_limit(config: Any) -> int | None:
    """Up to here rotary frequencies are constant. Beyond it, ``dynamic`` and ``longrope`` choose them by the longest
    text of the batch (and ``dynamic`` by texts before it), so that a state would depend on its neighbours.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") not in ("dynamic", "longrope"):
        return None
    name = "original_max_position_embeddings"
    return int(rope.get(name) or getattr(config, name, None) or config.max_position_embeddings)
