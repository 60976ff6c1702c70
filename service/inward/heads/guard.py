"""Guarded generation: a response ends where its pooled score falls below a threshold. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from inward.errors import DataError, HeadError, InvalidField
from inward.heads.pooling import Pool
from inward.heads.running import RunningScore
from inward.types import Floats

RATES = (0.01, 0.02, 0.05, 0.1, 0.2)
"""False-positive rates for which thresholds are kept."""


class Guard:
    """The stop rule on one response. Without a finite score a token is not safe."""

    def __init__(self, below: float, pool: Pool, after: int) -> None:
        self._below, self._after = below, after
        self._running = RunningScore(pool)
        self.safe = 0
        """Tokens up to the last one at which the pooled score was not below the threshold: only they may be given."""
        self.score = float("nan")
        """Pooled score of the tokens so far."""
        self.stopped = False

    @property
    def tokens(self) -> int:
        """That it has seen; none after the one that stopped it."""
        return self._running.tokens

    def push(self, score: float, values_K: Floats) -> bool:
        """Adds a token; whether the response ends there."""
        self.score = self._running.push(score, values_K)
        if self.score >= self._below:
            self.safe = self.tokens
        else:
            self.stopped = self.tokens > self._after
        return self.stopped


@dataclass(frozen=True, slots=True)
class GuardThresholds:
    """Thresholds by the share of acceptable responses that they stop: an element of ``calibration["guard"]``."""

    pool: Pool
    rates: tuple[float, ...]
    """Ascending."""
    thresholds: tuple[float, ...]
    """Below which so many of the acceptable responses fall, at their lowest running score."""

    @classmethod
    def fit(cls, pool: Pool, lowest_N: Sequence[float], rates: Sequence[float] = RATES) -> Self:
        """Of the lowest pooled running score of each of some acceptable responses.

        Raises:
            DataError: too few to tell the smallest rate.
        """
        cls.check(len(lowest_N), rates)
        return cls(pool, tuple(rates), tuple(float(t) for t in np.quantile(np.asarray(lowest_N), rates)))

    @staticmethod
    def check(responses: int, rates: Sequence[float] = RATES) -> None:
        """That so many acceptable responses are enough.

        Raises:
            DataError: too few to tell the smallest rate.
        """
        if responses * min(rates) < 1:
            raise DataError(
                f"a false-positive rate of {min(rates):g} needs {math.ceil(1 / min(rates))} acceptable responses, not "
                f"{responses}"
            )

    def dump(self) -> dict[str, Any]:
        """The element."""
        return {
            "pool": self.pool.model_dump(exclude_defaults=True),
            "rates": list(self.rates),
            "thresholds": list(self.thresholds),
        }

    def threshold(self, rate: float) -> float:
        """Between two rates a line is drawn."""
        return float(np.interp(rate, self.rates, self.thresholds))


def guard_threshold(calibration: Mapping[str, Any], pool: Pool, rate: float, *, head: str) -> float:
    """The threshold at which a head, pooled so, stops this share of the acceptable responses.

    Raises:
        HeadError: its calibration can't be read.
        InvalidField: it is not calibrated for this pool, or not for so small or large a rate.
    """
    try:
        fitted = [
            GuardThresholds(Pool(**one["pool"]), tuple(map(float, one["rates"])), tuple(map(float, one["thresholds"])))
            for one in calibration.get("guard", ())
        ]
    except (TypeError, ValueError, KeyError) as error:
        raise HeadError(f"calibration.guard in head.json can't be read ({error!r}): fit it again") from None
    own = next((one for one in fitted if one.pool == pool), None)
    if own is None:
        raise InvalidField(
            f"head {head!r} has no thresholds for a false-positive rate with pool {pool.name!r}: fit them (inward fit "
            "guard), or give stop_when.below, a score",
            param="stop_when.fpr",
        )
    if not own.rates[0] <= rate <= own.rates[-1]:
        raise InvalidField(
            f"head {head!r} is calibrated for rates from {own.rates[0]:g} to {own.rates[-1]:g}", param="stop_when.fpr"
        )
    return own.threshold(rate)
