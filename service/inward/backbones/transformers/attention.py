"""Attention over packed groups, as an attention function of transformers' public ``AttentionInterface``.

Only attention mixes tokens, so it alone has to know how the groups lie. Everything else in a decoder sees one row of T
tokens. Outside ``packed`` the same implementation is transformers' own SDPA, so that one model serves packed reading,
padded reading and generation without being switched over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from inward.backbones.transformers.packing import Segment

NAME = "inward_packed"
_HARMLESS = {
    "is_causal",
    "position_ids",
    "position_embeddings",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "cache_position",
    "past_key_values",
    "past_key_value",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "layer_idx",
    "head_mask",
}


class Unpackable(Exception):
    """The model asks its attention for something that packed attention does not do."""


class AttentionLayout:
    """How the groups of one forward pass lie, and the masks that its layers share."""

    def __init__(self, segments: Sequence[Segment], device: torch.device, dtype: torch.dtype) -> None:
        self.segments = segments
        self.windows: dict[int, int | None] = {}
        """The window that each layer asked for, by its index: shows at loading whether attention comes through here
        at all."""
        self._device, self._dtype = device, dtype
        self._masks: dict[tuple[int, int, int | None], torch.Tensor] = {}

    def mask(self, past: int, own: int, window: int | None) -> torch.Tensor:
        """What ``own`` tokens see of ``past`` tokens and of themselves: additive, ``[own, past + own]``."""
        key = (past, own, window)
        if key not in self._masks:
            query = torch.arange(past, past + own, device=self._device)[:, None]
            position = torch.arange(past + own, device=self._device)
            unseen = position > query
            if window is not None:
                unseen |= position <= query - window
            self._masks[key] = torch.zeros(unseen.shape, dtype=self._dtype, device=self._device).masked_fill_(
                unseen, -torch.inf
            )
        return self._masks[key]


_layout: ContextVar[AttentionLayout | None] = ContextVar("layout", default=None)


@contextmanager
def packed(layout: AttentionLayout) -> Iterator[None]:
    """Within it, models whose attention implementation is ``NAME`` read their input as one row of groups."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


def register() -> None:
    """Makes ``NAME`` known to transformers."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    return None if _layout.get() else sdpa_mask(*args, **kwargs)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """``query`` ``[1, H, T, d]``, ``key`` and ``value`` ``[1, H_kv, T, d]``; gives ``[1, T, H, d]``."""
    layout = _layout.get()
    if layout is None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out, None
    strange = [name for name, given in kwargs.items() if given is not None and name not in _HARMLESS]
    if (
        strange
        or attention_mask is not None
        or kwargs.get("is_causal") is False
        or not getattr(module, "is_causal", True)
    ):
        raise Unpackable(f"{type(module).__name__} passes {', '.join(strange) or 'a mask of its own'} to its attention")
    layout.windows[getattr(module, "layer_idx", len(layout.windows))] = sliding_window
    T, H, d = query.shape[2], query.shape[1], value.shape[-1]
    if (
        key.shape[1] != H
    ):  # once for the row instead of once a group; SDPA's own ``enable_gqa`` leaves the fused kernel on a CPU
        key = key.repeat_interleave(H // key.shape[1], dim=1)
        value = value.repeat_interleave(H // value.shape[1], dim=1)
    out_THd = query.new_empty(1, T, H, d)
    for segment in layout.segments:
        for rows, attended in _attend(query, key, value, segment, layout, scaling, sliding_window):
            out_THd[:, rows.start : rows.stop] = attended.transpose(1, 2)
    return out_THd, None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segment: Segment,
    layout: AttentionLayout,
    scaling: float | None,
    window: int | None,
) -> Iterator[tuple[range, torch.Tensor]]:
    """The prompt with its first response, which follows it directly, as one causal text; then each other response
    behind the prompt.
    """
    prompt, P = segment.prompt, len(segment.prompt)
    first, *others = segment.responses or (range(prompt.stop, prompt.stop),)
    text = range(prompt.start, first.stop)

    def rows(tensor: torch.Tensor, span: range) -> torch.Tensor:
        return tensor[:, :, span.start : span.stop]

    if text:
        narrow = window is not None and len(text) > window
        mask = layout.mask(0, len(text), window) if narrow else None
        yield text, _sdpa(rows(query, text), rows(key, text), rows(value, text), mask, scaling)
    for response in filter(None, others):
        limit = window if window is not None and P + len(response) > window else None
        k = torch.cat([rows(key, prompt), rows(key, response)], dim=2)
        v = torch.cat([rows(value, prompt), rows(value, response)], dim=2)
        yield response, _sdpa(rows(query, response), k, v, layout.mask(P, len(response), limit), scaling)


def _sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scaling: float | None
) -> torch.Tensor:
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling)
