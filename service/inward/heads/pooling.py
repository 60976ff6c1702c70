"""From the scores of a response's tokens to its score: a head's option, where one position does not say enough.

A head's map is the same at every token, so its token scores come from the pass that is made anyway; pooling comes
after it, in a few numbers of state a response, and streams: tokens are pushed as they come, the value is that of the
tokens so far. A high score is a safe one, so the *extreme* of the names that say ``max`` is the lowest, the least safe.

    last         the last token's
    mean         the mean
    max_ema      the extreme of e_t = alpha s_t + (1 - alpha) e_{t-1}, e_1 = s_1
    max_rolling  the extreme of the means of ``window`` tokens in a row (of all, while there are fewer)
    topk         the mean of the ``k`` lowest (arXiv 2604.14865)
    gated_mean   sum g_t s_t / sum g_t, g_t = sigmoid(<u, h_t> + b), u and b trained (arXiv 2505.12225)
    attention    the same with g_t = exp(<u, h_t> + b): an attention probe with one query (arXiv 2601.11516)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Literal, Protocol, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from inward.errors import HeadError, InternalError
from inward.types import Doubles, Floats, Position, Reading, Tap

PoolName = Literal["last", "mean", "max_ema", "max_rolling", "topk", "gated_mean", "attention"]
TRAINED: frozenset[PoolName] = frozenset({"gated_mean", "attention"})
"""Pools that read a number more of every token, by a map that has to be trained."""


class Pool(BaseModel):
    """``Manifest.pool``: which pool, and its parameters; those of other pools are not looked at."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: PoolName
    alpha: float = Field(0.5, gt=0, le=1)
    window: int = Field(10, ge=1)
    k: int = Field(10, ge=1)
    layer: int | None = Field(None, ge=0)
    """Of a trained pool: where its map reads the tokens."""

    @model_validator(mode="after")
    def _trained_pools_read_a_layer(self) -> Self:
        if (self.layer is None) == (self.name in TRAINED):
            raise ValueError("pools gated_mean and attention need the layer that they read, the others read none")
        return self

    @classmethod
    def parse(cls, text: str, *, layer: int | None = None) -> Self:
        """``name``, or ``name:parameter=value,…``, as on the command line; ``layer``: for a pool that will be trained.

        Raises:
            ValueError: an unknown name or parameter, or a value that it does not take.
        """
        name, _, rest = text.partition(":")
        fields = {part.partition("=")[0]: part.partition("=")[2] for part in rest.split(",") if part}
        return cls.model_validate({"name": name, **fields} | ({"layer": layer} if name in TRAINED else {}))


class Pooling(Protocol):
    """What is kept of the tokens so far."""

    def push(self, scores_T: Doubles, logits_T: Doubles | None = None) -> None:
        """Adds the next tokens' scores, and what a trained pool reads of them."""
        ...

    @property
    def value(self) -> float:
        """Pooled score of the tokens so far; NaN before the first."""
        ...


def pooling(pool: Pool) -> Pooling:
    """An empty one."""
    match pool.name:
        case "last":
            return _Last()
        case "mean":
            return _Mean()
        case "max_ema":
            return _MaxEma(pool.alpha)
        case "max_rolling":
            return _MaxRolling(pool.window)
        case "topk":
            return _TopK(pool.k)
        case "gated_mean":
            return _GatedMean()
        case "attention":
            return _Attention()


class Pooler:
    """A head's pool: what it adds to the head's readout, and how it makes a response's score of its tokens'."""

    def __init__(
        self, pool: Pool, position: Position, weight_D: Floats | None, bias: float, *, final_norm: bool
    ) -> None:
        """``position``: the head's, where an empty response is read; ``weight_D``, ``bias``: map of a trained pool."""
        self.pool = pool
        self.weight_D, self.bias = weight_D, bias
        self.taps: tuple[Tap, ...] = ()
        if weight_D is not None and pool.layer is not None:
            bias_K = np.array([bias], dtype=np.float32)
            self.taps = (Tap(pool.layer, position, weight_D[:, None], bias_K, final_norm=final_norm),)

    @classmethod
    def of(
        cls,
        pool: Pool | None,
        tensors: Mapping[str, Floats],
        *,
        layers: tuple[int, ...],
        position: Position,
        final_norm: bool,
    ) -> Self | None:
        """The pool of a head that reads ``layers`` (after the final norm, of the last of them, with ``final_norm``).

        Raises:
            HeadError: a trained pool reads a layer that the head does not.
        """
        if pool is None:
            return None
        if pool.layer is not None and pool.layer not in layers:
            raise HeadError(f"pool.layer in head.json is {pool.layer}, but the head reads {list(layers)}: fit it again")
        weight_D = tensors.get("pool_weight")
        bias = float(tensors["pool_bias"][0]) if weight_D is not None else 0.0
        return cls(pool, position, weight_D, bias, final_norm=final_norm and pool.layer == max(layers))

    @property
    def tensors(self) -> dict[str, Floats]:
        """What it adds to ``head.safetensors``."""
        if self.weight_D is None:
            return {}
        return {"pool_weight": self.weight_D, "pool_bias": np.array([self.bias], dtype=np.float32)}

    def scores(self, reading: Reading, score: Callable[[Floats], Doubles]) -> Doubles:
        """``[N]``: pooled scores; of a response without tokens, the score where the head reads it.

        Args:
            reading: of the head's own readout and ``taps``.
            score: from the head's own numbers ``[T, K]`` to scores ``[T]``.
        """
        if reading.tokens_TK is None:
            raise InternalError("the head pools token scores, but the backbone was not asked to read every token")
        own = reading.values_NK.shape[1] - len(self.taps)
        pooled_N = np.array(score(reading.values_NK[:, :own]), dtype=np.float64)
        for n, values_TK in enumerate(reading.tokens_TK):
            if len(values_TK):
                state = pooling(self.pool)
                state.push(score(values_TK[:, :own]), values_TK[:, own].astype(np.float64) if self.taps else None)
                pooled_N[n] = state.value if np.isfinite(values_TK).all() else math.nan
        return pooled_N


def shapes(pool: Pool | None) -> dict[str, tuple[int | str, ...]]:
    """Names and shapes of the tensors that a pool adds, for ``tensors.expect``."""
    return {"pool_weight": ("D",), "pool_bias": (1,)} if pool is not None and pool.name in TRAINED else {}


class _Last:
    value: float = math.nan

    def push(self, scores_T: Doubles, logits_T: Doubles | None = None) -> None:
        self.value = float(scores_T[-1])


class _Mean:
    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0

    def push(self, scores_T: Doubles, logits_T: Doubles | None = None) -> None:
        self._sum += float(scores_T.sum(dtype=np.float64))
        self._count += len(scores_T)

    @property
    def value(self) -> float:
        return self._sum / self._count if self._count else math.nan


class _MaxEma:
    def __init__(self, alpha: float) -> None:
        self._alpha, self._average = alpha, math.nan
        self.value = math.nan

    def push(self, scores_T: Doubles, logits_T: Doubles | None = None) -> None:
        before = float(scores_T[0]) if math.isnan(self._average) else self._average
        alpha = self._alpha
        averages = list(accumulate(map(float, scores_T), lambda e, s: alpha * s + (1 - alpha) * e, initial=before))
        self._average = averages[-1]
        self.value = float(np.fmin(self.value, min(averages[1:])))


class _MaxRolling:
    def __init__(self, window: int) -> None:
        self._window, self._recent = window, np.empty(0)
        self._extreme = math.inf

    def push(self, scores_T: Doubles, logits_T: Doubles | None = None) -> None:
        joined_T = np.concatenate([self._recent, scores_T.astype(np.float64)])
        if len(joined_T) >= self._window:
            windows_TW = np.lib.stride_tricks.sliding_window_view(joined_T, self._window)
            self._extreme = min(self._extreme, float(windows_TW.mean(axis=1).min()))
        self._recent = joined_T[-(self._window - 1) :] if self._window > 1 else joined_T[:0]

    @property
    def value(self) -> float:
        if math.isinf(self._extreme):
            return float(self._recent.mean()) if len(self._recent) else math.nan
        return self._extreme


class _TopK:
    def __init__(self, k: int) -> None:
        self._k, self._lowest = k, np.empty(0)

    def push(self, scores_T: Doubles, logits_T: Doubles | None = None) -> None:
        joined_T = np.concatenate([self._lowest, scores_T.astype(np.float64)])
        self._lowest = np.partition(joined_T, self._k - 1)[: self._k] if len(joined_T) > self._k else joined_T

    @property
    def value(self) -> float:
        return float(self._lowest.mean()) if len(self._lowest) else math.nan


class _Attention:
    """Sums about the largest logit so far, so that nothing overflows."""

    def __init__(self) -> None:
        self._sum, self._weight, self._largest = 0.0, 0.0, -math.inf

    def push(self, scores_T: Doubles, logits_T: Doubles | None = None) -> None:
        logits = _needed(logits_T)
        largest = max(self._largest, float(logits.max()))
        before = math.exp(self._largest - largest) if self._weight else 0.0
        weights_T = np.exp(logits - largest)
        self._sum = self._sum * before + float(weights_T @ scores_T)
        self._weight = self._weight * before + float(weights_T.sum())
        self._largest = largest

    @property
    def value(self) -> float:
        return self._sum / self._weight if self._weight > 0 else math.nan


class _GatedMean(_Attention):
    """With the logarithms of its gates, which may all be next to nothing."""

    def push(self, scores_T: Doubles, logits_T: Doubles | None = None) -> None:
        super().push(scores_T, -np.logaddexp(0.0, -_needed(logits_T)))


def _needed(logits_T: Doubles | None) -> Doubles:
    if logits_T is None:
        raise InternalError("a trained pool was given token scores without what it reads of the tokens")
    return logits_T
