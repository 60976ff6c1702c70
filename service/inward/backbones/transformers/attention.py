"""Attention over packed groups, as an attention function of transformers' public ``AttentionInterface``.

Only attention mixes tokens, so it alone has to know how the groups lie. Everything else in a decoder sees one row of T
tokens. Outside ``packed`` the same implementation is transformers' own SDPA, so that one model serves packed reading,
padded reading and generation without being switched over.

SDPA leaves out without a word what it does not know (a soft cap on the logits, learned sinks). So nothing is left to it
that is not known to be harmless: within ``packed`` a cap and sinks are computed here and anything else is refused, and
outside a model that asks for more than SDPA knows gets its own eager attention (``EAGER``).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from inward.backbones.transformers.packing import Segment

SDPA, EAGER = "inward_packed", "inward_packed_eager"
"""Names of the two implementations: alike within ``packed``; outside, SDPA or the model's own eager attention."""
SHARPNESS = 8.0
"""Size of queries and keys within ``sharpened``: logits then spread over tens, as in trained models, where a cap that
is missing shows."""
_HARMLESS = frozenset(
    "is_causal position_ids position_embeddings use_cache output_attentions output_hidden_states output_router_logits "
    "return_dict cache_position past_key_values past_key_value encoder_hidden_states encoder_attention_mask layer_idx "
    "head_mask dropout scaling sliding_window".split()
)
"""What any model's layers may pass."""
_COMPUTED = {"softcap", "s_aux"}


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
            seen = torch.zeros(unseen.shape, dtype=self._dtype, device=self._device)
            self._masks[key] = seen.masked_fill_(unseen, -torch.inf)
        return self._masks[key]


_layout: ContextVar[AttentionLayout | None] = ContextVar("layout", default=None)
_sharp: ContextVar[bool] = ContextVar("sharp", default=False)


@contextmanager
def packed(layout: AttentionLayout) -> Iterator[None]:
    """Within it, models whose attention implementation is one of ours read their input as one row of groups."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


@contextmanager
def sharpened() -> Iterator[None]:
    """Within it, our implementations give every query and key the size ``SHARPNESS``. For the check at loading."""
    token = _sharp.set(True)
    try:
        yield
    finally:
        _sharp.reset(token)


def register() -> None:
    """Makes both names known to transformers."""
    for name, attend, mask in ((SDPA, _outside_sdpa, sdpa_mask), (EAGER, _outside_eager, eager_mask)):
        AttentionInterface.register(name, _Attention(attend))
        AttentionMaskInterface.register(name, _Mask(mask))


class _Mask:
    def __init__(self, outside: Any) -> None:
        self._outside = outside

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        return None if _layout.get() else self._outside(*args, **kwargs)


class _Attention:
    """``query`` ``[1, H, T, d]``, ``key`` and ``value`` ``[1, H_kv, T, d]``; gives ``[1, T, H, d]``."""

    def __init__(self, outside: Any) -> None:
        self._outside = outside

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, Any]:
        if _sharp.get():
            query, key = _sized(query), _sized(key)
        layout = _layout.get()
        if layout is None:
            options = {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window, **kwargs}
            return self._outside(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
        strange = sorted(_asked(kwargs) - _COMPUTED)
        if strange or attention_mask is not None or _bidirectional(module, kwargs):
            raise Unpackable(f"{type(module).__name__} passes {', '.join(strange) or 'a mask of its own'} to attention")
        layout.windows[getattr(module, "layer_idx", len(layout.windows))] = sliding_window
        H = query.shape[1]
        if key.shape[1] != H:
            # once for the row instead of once a group; SDPA's own ``enable_gqa`` leaves the fused kernel on a CPU
            key = key.repeat_interleave(H // key.shape[1], dim=1)
            value = value.repeat_interleave(H // value.shape[1], dim=1)
        rule = _Rule(layout, scaling, sliding_window, kwargs.get("softcap"), kwargs.get("s_aux"))
        out_THd = query.new_empty(1, query.shape[2], H, value.shape[-1])
        for segment in layout.segments:
            for rows, attended in _attend(query, key, value, segment, rule):
                out_THd[:, rows.start : rows.stop] = attended.transpose(1, 2)
        return out_THd, None


def _outside_sdpa(module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
    if strange := sorted(_asked(kwargs) - {"position_bias"}):
        raise Unpackable(
            f"{type(module).__name__} passes {', '.join(strange)} to attention, which SDPA would leave out"
        )
    return sdpa_attention_forward(module, *args, **kwargs)  # type: ignore[no-any-return]


def _outside_eager(module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
    """The eager attention of the file that defines the model, as transformers itself would call it."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, *args, **kwargs)  # type: ignore[no-any-return]


def _asked(kwargs: dict[str, Any]) -> set[str]:
    """What a layer asks for beyond the usual."""
    return {name for name, given in kwargs.items() if given is not None and name not in _HARMLESS}


def _bidirectional(module: torch.nn.Module, kwargs: dict[str, Any]) -> bool:
    return kwargs.get("is_causal") is False or not getattr(module, "is_causal", True)


def _sized(states: torch.Tensor) -> torch.Tensor:
    return SHARPNESS * states / (states.square().mean(dim=-1, keepdim=True) + 1e-12).sqrt()


class _Rule(NamedTuple):
    """How one layer attends."""

    layout: AttentionLayout
    scaling: float | None
    window: int | None
    softcap: float | None
    sinks_H: torch.Tensor | None

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, past: int) -> torch.Tensor:
        """``q`` are tokens that follow ``past`` others of ``k`` and ``v``."""
        window = self.window if self.window is not None and k.shape[2] > self.window else None
        plain = self.softcap is None and self.sinks_H is None
        if plain and not past and window is None:
            return scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scaling)
        mask = self.layout.mask(past, q.shape[2], window)
        if plain:
            return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scaling)
        return self._eager(q, k, v, mask)

    def _eager(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The soft cap of Gemma 2 (``cap * tanh(logits / cap)``), and the sinks of GPT-OSS: one more logit a head,
        which takes weight and gives nothing.
        """
        logits = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if self.scaling is None else self.scaling)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        logits = logits + mask
        if self.sinks_H is not None:
            sinks = self.sinks_H.reshape(1, -1, 1, 1).expand(logits.shape[0], -1, logits.shape[2], 1)
            logits = torch.cat([logits, sinks.to(logits.dtype)], dim=-1)
        weights = logits.softmax(dim=-1, dtype=torch.float32)[..., : k.shape[2]].to(q.dtype)
        return weights @ v


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segment: Segment, rule: _Rule
) -> Iterator[tuple[range, torch.Tensor]]:
    """The prompt with its first response, which follows it directly, as one causal text; then each other response
    behind the prompt.
    """
    prompt = segment.prompt
    first, *others = segment.responses or (range(prompt.stop, prompt.stop),)
    text = range(prompt.start, first.stop)

    def rows(tensor: torch.Tensor, span: range) -> torch.Tensor:
        return tensor[:, :, span.start : span.stop]

    if text:
        yield text, rule.attend(rows(query, text), rows(key, text), rows(value, text), 0)
    for response in filter(None, others):
        k = torch.cat([rows(key, prompt), rows(key, response)], dim=2)
        v = torch.cat([rows(value, prompt), rows(value, response)], dim=2)
        yield response, rule.attend(rows(query, response), k, v, len(prompt))
