"""Rotary positions: what a GGUF file says of them and transformers' reader passes over."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from inward.backbones.gguf.header import Header
from inward.errors import SetupError

LLAMA3 = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
TABLES = frozenset({LLAMA3, LONG, SHORT})
"""Tensors that are settings and not weights."""
_LOW, _HIGH, _ORIGINAL = 1.0, 4.0, 8192
"""Of every Llama 3.1, 3.2 and 3.3; only the factor differs. The file holds what comes of them, not the settings."""


def set_rope(config: Any, header: Header) -> None:
    """Completes the rotary settings of ``config``.

    Raises:
        SetupError: the file scales positions in a way that can't be carried over.
    """
    every = getattr(config, "rope_parameters", None)
    if not every:
        return
    nested = "full_attention" in every
    rope = every["full_attention"] if nested else every
    if (base := header.setting("rope.freq_base", float)) is not None:
        rope["rope_theta"] = base
    if not nested:
        _check_width(config, rope, header)
    rope |= _scaling(config, rope, header)


def _scaling(config: Any, rope: dict[str, Any], header: Header) -> dict[str, Any]:
    kind = header.setting("rope.scaling.type", str, "none")
    factor = header.setting("rope.scaling.factor", float, header.setting("rope.scale_linear", float, 1.0))
    original = header.setting("rope.scaling.original_context_length", int)
    if LLAMA3 in header.tensors:
        return _llama3(_table(header, LLAMA3), rope["rope_theta"], header)
    if LONG in header.tensors and SHORT in header.tensors:
        config.original_max_position_embeddings = original or config.max_position_embeddings
        attention = header.setting("rope.scaling.attn_factor", float)
        return {
            "rope_type": "longrope",
            "long_factor": _table(header, LONG).tolist(), "short_factor": _table(header, SHORT).tolist(),
            "original_max_position_embeddings": config.original_max_position_embeddings,
            **({"attention_factor": attention} if attention else {}),
        }  # fmt: skip
    if kind == "none" or factor == 1.0:
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and original:
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise SetupError(
        f"{header.path} scales rotary positions by {kind!r} (factor {factor:g}), which can't be carried over"
    )


def _llama3(ratios: NDArray[np.float64], theta: float, header: Header) -> dict[str, Any]:
    """The settings of Llama 3's scaling by its result, ``ratios`` of wavelengths ``[head_dim / 2]``.

    As transformers computes them (``modeling_rope_utils._compute_llama3_parameters``).
    """
    factor = float(ratios.max())
    waves = 2 * np.pi * theta ** (np.arange(len(ratios)) / len(ratios))
    smooth = np.clip((_ORIGINAL / waves - _LOW) / (_HIGH - _LOW), 0, 1)
    if not np.allclose(ratios, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
        raise SetupError(
            f"{header.path} scales rotary positions by a table ({LLAMA3}) that is not Llama 3's: it can't be read"
        )
    return {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": _LOW, "high_freq_factor": _HIGH,
        "original_max_position_embeddings": _ORIGINAL,
    }  # fmt: skip


def _check_width(config: Any, rope: dict[str, Any], header: Header) -> None:
    """How much of each head is rotated must be what transformers rotates."""
    stated = header.setting("rope.dimension_count", int)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotated = int(head * rope.get("partial_rotary_factor", 1.0))
    if stated is not None and stated != rotated:
        raise SetupError(
            f"{header.path} rotates {stated} dimensions of each head, and transformers would rotate {rotated}"
        )


def _table(header: Header, name: str) -> NDArray[np.float64]:
    entry = header.tensors[name]
    if entry.type != "F32" or len(entry.shape) != 1:
        raise SetupError(f"{header.path}: {name} is no list of float32 numbers")
    with header.path.open("rb") as file:
        file.seek(entry.start)
        return np.frombuffer(file.read(entry.size), "<f4").astype(np.float64)
