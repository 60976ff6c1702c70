"""Statistics that take weights, so that a bootstrap over prompts is the same computation with other weights.

A *statistic* is a function from weights ``[B, N]`` (one row a resample, one column an item) to ``[B]``. Weights of one
give the value itself. Where a resample leaves a statistic undefined (one class only, for an AUC) it is NaN and does not
enter the interval.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from inward.errors import DataError
from inward.types import Doubles, Indices

Statistic = Callable[[Doubles], Doubles]
RESAMPLES = 1000
_CELLS = 1_000_000
"""Weights in memory at once."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        """``{"value", "low", "high"}``."""
        return {"value": self.value, "low": self.low, "high": self.high}

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(statistic: Statistic, groups: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate | None:
    """The statistic with its percentile interval over resampled groups: prompts are drawn, not rows, since rows of one
    prompt depend.

    Args:
        groups: ``[N]``, the group of each item.

    Returns:
        None where the statistic is not defined on the data.

    Raises:
        DataError: one group only, which says nothing about another.
    """
    labels, item_N = np.unique(np.asarray(groups), return_inverse=True)
    if len(labels) < 2:
        raise DataError(f"an interval needs responses to at least two different prompts; these are of {len(labels)}")
    value = float(statistic(np.ones((1, len(item_N))))[0])
    if not np.isfinite(value):
        return None
    rng = np.random.default_rng(seed)
    step = max(1, _CELLS // len(item_N))
    parts = []
    for start in range(0, resamples, step):
        counts_BG = rng.multinomial(
            len(labels), np.full(len(labels), 1 / len(labels)), size=min(step, resamples - start)
        )
        parts.append(statistic(counts_BG[:, item_N].astype(np.float64)))
    values_B = np.concatenate(parts)
    low, high = np.quantile(values_B[np.isfinite(values_B)], [0.025, 0.975])
    return Estimate(value, float(low), float(high))


@dataclass(frozen=True, slots=True)
class Resampling:
    """How intervals are made."""

    resamples: int = RESAMPLES
    seed: int = 0

    def estimate(self, statistic: Statistic, prompts: Indices) -> Estimate | None:
        """As ``bootstrap``; None also where all items are of one prompt, so that there can be no interval."""
        if len(np.unique(prompts)) < 2:
            return None
        return bootstrap(statistic, prompts, resamples=self.resamples, seed=self.seed)


USUAL = Resampling()


def mean(values: ArrayLike) -> Statistic:
    """Weighted mean of ``values`` ``[N]``; undefined where all weights are zero."""
    values_N = np.asarray(values, dtype=np.float64)
    return lambda weights_BN: _ratio(weights_BN @ values_N, weights_BN.sum(axis=1))


def auc(scores: ArrayLike, labels: ArrayLike) -> Statistic:
    """Area under the ROC curve: the chance that an item of the true class scores above one of the other; a tie
    counts half.
    """
    scores_N, true_N = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=bool)
    order_N, starts = _runs(scores_N)

    def statistic(weights_BN: Doubles) -> Doubles:
        sorted_BN = weights_BN[:, order_N]
        true_BU = np.add.reduceat(sorted_BN * true_N[order_N], starts, axis=1)
        false_BU = np.add.reduceat(sorted_BN * ~true_N[order_N], starts, axis=1)
        below_BU = np.cumsum(false_BU, axis=1) - false_BU
        won_B = (true_BU * (below_BU + 0.5 * false_BU)).sum(axis=1)
        return _ratio(won_B, true_BU.sum(axis=1) * false_BU.sum(axis=1))

    return statistic


def macro_f1(predicted: ArrayLike, labels: ArrayLike) -> Statistic:
    """Mean of the F1 of both classes; a class that is neither present nor predicted counts 0, as in scikit-learn."""
    said_N, true_N = np.asarray(predicted, dtype=bool), np.asarray(labels, dtype=bool)

    def f1(said: NDArray[np.bool_], true: NDArray[np.bool_], weights_BN: Doubles) -> Doubles:
        both, all_ = weights_BN @ (said & true).astype(float), weights_BN @ (said.astype(float) + true)
        return np.asarray(np.where(all_ > 0, 2 * both / np.where(all_ > 0, all_, 1.0), 0.0), dtype=np.float64)

    return lambda weights_BN: 0.5 * (f1(said_N, true_N, weights_BN) + f1(~said_N, ~true_N, weights_BN))


def calibration_error(probabilities: ArrayLike, labels: ArrayLike) -> Statistic:
    """Expected calibration error (Guo et al., ICML 2017): mean gap of stated and observed rate over 15 bins of equal
    width.
    """
    p_N, true_N = np.asarray(probabilities, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    member_NK = np.eye(15)[bin_of(p_N, 15)]
    gap_NK = member_NK * (p_N - true_N)[:, None]
    return lambda weights_BN: _ratio(np.abs(weights_BN @ gap_NK).sum(axis=1), weights_BN.sum(axis=1))


def spearman(x: ArrayLike, y: ArrayLike) -> Statistic:
    """Rank correlation, ties at their mean rank; undefined where one side is constant."""
    rank_x, rank_y = _ranks(np.asarray(x, dtype=np.float64)), _ranks(np.asarray(y, dtype=np.float64))

    def statistic(weights_BN: Doubles) -> Doubles:
        total_B = weights_BN.sum(axis=1)
        u, v = rank_x(weights_BN), rank_y(weights_BN)
        u -= _ratio((weights_BN * u).sum(axis=1), total_B)[:, None]
        v -= _ratio((weights_BN * v).sum(axis=1), total_B)[:, None]
        spread = np.sqrt((weights_BN * u * u).sum(axis=1) * (weights_BN * v * v).sum(axis=1))
        return _ratio((weights_BN * u * v).sum(axis=1), np.where(spread > 1e-12 * total_B**3, spread, 0.0))

    return statistic


def bin_of(probabilities: Doubles, bins: int) -> Indices:
    """Which of ``bins`` of equal width on [0, 1] each probability is in."""
    return np.clip((probabilities * bins).astype(np.int64), 0, bins - 1)


def _ranks(values_N: Doubles) -> Statistic:
    """Weighted mean ranks, ``[B, N]``."""
    order_N, starts = _runs(values_N)
    run_N = np.empty(len(values_N), dtype=np.int64)
    run_N[order_N] = np.repeat(np.arange(len(starts)), np.diff([*starts, len(values_N)]))

    def ranks(weights_BN: Doubles) -> Doubles:
        weight_BU = np.add.reduceat(weights_BN[:, order_N], starts, axis=1)
        return np.asarray((np.cumsum(weight_BU, axis=1) - 0.5 * weight_BU)[:, run_N])

    return ranks


def _runs(values_N: Doubles) -> tuple[Indices, Indices]:
    """Ascending order, and where in it each run of equal values begins."""
    order_N = np.argsort(values_N, kind="stable")
    sorted_N = values_N[order_N]
    return order_N, np.flatnonzero(np.r_[True, sorted_N[1:] != sorted_N[:-1]])


def _ratio(above: Any, below: Any) -> Doubles:
    """NaN where ``below`` is zero."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(below > 0, above / below, np.nan), dtype=np.float64)
