"""Figures with their intervals: 95 %, bootstrapped over prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from inward.errors import DataError
from inward.offline.evaluate.statistics import Statistic, auc, bootstrap, calibration_error, mean
from inward.types import Doubles

Figure = dict[str, float] | None
"""``value``, ``low`` and ``high``; with several seeds ``spread``, their standard deviation."""
RESAMPLES = 1000


def figure(statistic: Statistic, groups: ArrayLike) -> Figure:
    """A statistic with its interval; without one where all rows are of one prompt."""
    try:
        found = bootstrap(statistic, groups, resamples=RESAMPLES)
    except DataError:
        return None
    return found.to_json() if found is not None else None


def share(values: ArrayLike, groups: ArrayLike | None = None) -> Figure:
    """The mean of values, one a row."""
    values_N = np.asarray(values, dtype=np.float64)
    return figure(mean(values_N), np.arange(len(values_N)) if groups is None else groups)


def over_seeds(runs: Sequence[Sequence[float]]) -> Figure:
    """Mean over seeds of the mean over prompts; the same prompts in every run. The interval resamples prompts, the
    spread is of the seeds.
    """
    if not runs:
        return None
    values_SP = np.array(runs, dtype=np.float64)
    found = share(values_SP.mean(axis=0))
    if found is not None and len(values_SP) > 1:
        found["spread"] = float(values_SP.mean(axis=1).std(ddof=1))
    return found


def paired(runs: Sequence[Sequence[float]], base: Sequence[Sequence[float]]) -> Figure:
    """Mean difference to another way on the same prompts."""
    if not runs or not base:
        return None
    return share(np.array(runs).mean(axis=0) - np.array(base).mean(axis=0))


def pair_accuracy(chosen: ArrayLike, rejected: ArrayLike, groups: ArrayLike) -> Figure:
    """Share of pairs whose chosen answer scores higher; equal is half."""
    a, b = np.asarray(chosen, dtype=np.float64), np.asarray(rejected, dtype=np.float64)
    return share((a > b) + 0.5 * (a == b), groups)


def of_judge(logits: ArrayLike, safe: Sequence[bool], groups: ArrayLike) -> dict[str, Figure]:
    """Accuracy, AUC and calibration of a judge."""
    logits_M, safe_M = np.asarray(logits, dtype=np.float64), np.asarray(safe, dtype=bool)
    return {
        "accuracy": share((logits_M > 0) == safe_M, groups),
        "AUC": figure(auc(logits_M, safe_M), groups),
        "calibration error": figure(calibration_error(probability(logits_M), safe_M), groups),
    }


def probability(logits: ArrayLike) -> Doubles:
    """Of being safe."""
    return np.asarray(1 / (1 + np.exp(-np.clip(np.asarray(logits, dtype=np.float64), -50, 50))))


def plain(values: Any) -> list[Any]:
    """As JSON."""
    return np.asarray(values, dtype=np.float64).round(6).tolist()  # type: ignore[no-any-return]
