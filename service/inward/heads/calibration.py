"""From raw margins and scores to numbers that mean something elsewhere: scaled margins, bins for a margin loss,
probabilities.

Everything is fitted on margins or scores that were held out from the head's own fit, and kept in
``Manifest.calibration``:

    margin_std     standard deviation of the calibration margins
    bin_edges      inner edges of the bins, ascending
    bin_values     one value a bin, in [0, 1]
    platt          {"slope", "intercept"} of the calibrated probability that a response is acceptable
    platt_pair     the same of the probability that a pair's label is right, by its margin
    score_deciles  the nine numbers between the tenths of the calibration scores
    acceptable     {"rates", "scores"}: the share of acceptable responses below each score
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from inward.errors import DataError, HeadError, InvalidField
from inward.types import Doubles, PairScores

TINY = 1e-9
"""In place of a width of nothing."""
FALSE_POSITIVE_RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""At which thresholds are kept."""
NEWTON_STEPS = 100
"""At most."""
BIN_VALUES = (0.0, 1 / 3, 2 / 3, 1.0)
"""The scale that TRL documents for the margins of Llama 2's reward model."""


def finite(value: float) -> float | None:
    """A score; None in the place of one that is none."""
    return float(value) if math.isfinite(value) else None


def softmax(x: Doubles) -> Doubles:
    """Over the last axis."""
    weights = np.exp(x - x.max(axis=-1, keepdims=True, initial=-math.inf))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True), dtype=np.float64)


def sigmoid(x: ArrayLike) -> Doubles:
    """``1 / (1 + exp(-x))`` without overflow, elementwise."""
    return np.asarray(0.5 * (1 + np.tanh(0.5 * np.asarray(x, dtype=np.float64))), dtype=np.float64)


@dataclass(frozen=True, slots=True)
class MarginScale:
    """What makes margins of one model and layer comparable with those of another (LEGEND, arXiv 2406.08124).

    The bins are quantiles of the calibration margins that agree with their label: those below zero are in the lowest
    bin by definition, and would otherwise push the edges down until a margin of nothing got a high value.
    """

    std: float
    edges: tuple[float, ...]
    values: tuple[float, ...] = BIN_VALUES

    @classmethod
    def fit(cls, margins: ArrayLike) -> Self:
        """Fits scale and bins on calibration margins ``[N]`` (chosen minus rejected, raw).

        Raises:
            DataError: margins that are not finite or all equal, or too few above zero for the bins.
        """
        margins_N = np.asarray(margins, dtype=np.float64).ravel()
        if not np.isfinite(margins_N).all():
            raise DataError("calibration margins must be finite; some are NaN or infinite")
        agreeing = margins_N[margins_N > 0]
        bins = len(BIN_VALUES)
        if len(agreeing) < bins:
            raise DataError(
                f"only {len(agreeing)} of {len(margins_N)} calibration margins are above zero, too few for "
                f"{bins} bins: use more calibration rows, another layer, or check that chosen and rejected are not "
                "exchanged"
            )
        std = float(margins_N.std())
        if not std > 0:
            raise DataError("all calibration margins are equal: the rows say nothing about the scale of a margin")
        return cls(std, tuple(np.quantile(agreeing, np.arange(1, bins) / bins).tolist()))

    @classmethod
    def load(cls, calibration: Mapping[str, Any]) -> Self | None:
        """Out of a manifest's ``calibration``; None where the head has no margin scale.

        Raises:
            HeadError: names the entry that cannot be used.
        """
        if "margin_std" not in calibration:
            return None
        try:
            std = float(calibration["margin_std"])
            edges = tuple(float(e) for e in calibration["bin_edges"])
            values = tuple(float(v) for v in calibration["bin_values"])
        except (TypeError, ValueError, KeyError) as error:
            raise HeadError(
                f"calibration in head.json: margin_std, bin_edges and bin_values must be numbers ({error!r})"
            ) from None
        if not (math.isfinite(std) and std > 0):
            raise HeadError(
                f"calibration.margin_std in head.json is {std}; it must be a positive number: fit the head again"
            )
        if (
            len(values) != len(edges) + 1
            or list(edges) != sorted(edges)
            or not all(map(math.isfinite, (*edges, *values)))
        ):
            raise HeadError(
                "calibration in head.json: bin_edges must ascend and bin_values must be one more: fit the head again"
            )
        return cls(std, edges, values)

    def dump(self) -> dict[str, Any]:
        """The entries of a manifest's ``calibration``."""
        return {"margin_std": self.std, "bin_edges": list(self.edges), "bin_values": list(self.values)}

    def bin(self, margin: float) -> float:
        """The value of the bin that ``margin`` falls into; the lowest for a margin at or below zero. On an edge: the
        upper bin.
        """
        return self.values[int(np.searchsorted(self.edges, margin, side="right"))] if margin > 0 else self.values[0]


@dataclass(frozen=True, slots=True)
class Platt:
    """Logistic calibration of a score: ``p = sigmoid(slope * score + intercept)``."""

    slope: float
    intercept: float

    @classmethod
    def fit(cls, scores: ArrayLike, labels: ArrayLike) -> Self:
        """Newton's method with backtracking and Platt's smoothed targets (Lin, Lin and Weng, Machine Learning 68,
        2007).

        Args:
            scores: ``[N]``, held out from the head's fit.
            labels: ``[N]``, true where the response is acceptable.

        Raises:
            DataError: scores that are not finite, or labels of one class only.
        """
        s = np.asarray(scores, dtype=np.float64).ravel()
        y = np.asarray(labels).astype(bool).ravel()
        positives, negatives = int(y.sum()), int((~y).sum())
        if not np.isfinite(s).all():
            raise DataError("scores to calibrate on must be finite; some are NaN or infinite")
        if not positives or not negatives:
            raise DataError("calibration of a probability needs both acceptable and unacceptable responses")
        target = np.where(y, (positives + 1) / (positives + 2), 1 / (negatives + 2))
        # on a unit scale the Hessian is well conditioned whatever the score's units
        centre, spread = s.mean(), s.std() or 1.0
        x = np.stack([(s - centre) / spread, np.ones_like(s)])
        w = np.array([0.0, math.log((positives + 1) / (negatives + 1))])

        def loss(w: Doubles) -> float:
            z = w @ x
            return float(np.sum(np.logaddexp(0, z) - target * z))

        for _ in range(NEWTON_STEPS):
            p = sigmoid(w @ x)
            gradient = x @ (p - target)
            if np.abs(gradient).max() < 1e-9 * len(s):
                break
            step = np.linalg.solve((x * (p * (1 - p))) @ x.T + 1e-12 * np.eye(2), gradient)
            rate, before = 1.0, loss(w)
            while loss(w - rate * step) > before - 1e-4 * rate * float(gradient @ step) and rate > 1e-10:
                rate /= 2
            w = w - rate * step
        slope = float(w[0] / spread)
        return cls(slope, float(w[1] - slope * centre))

    @classmethod
    def load(cls, calibration: Mapping[str, Any], key: str = "platt") -> Self | None:
        """Out of a manifest's ``calibration[key]``; None where it is not calibrated.

        Raises:
            HeadError: an entry without finite ``slope`` and ``intercept``.
        """
        if calibration.get(key) is None:
            return None
        try:
            platt = cls(float(calibration[key]["slope"]), float(calibration[key]["intercept"]))
        except (TypeError, ValueError, KeyError) as error:
            raise HeadError(
                f"calibration.{key} in head.json needs the numbers slope and intercept ({error!r})"
            ) from None
        if not (math.isfinite(platt.slope) and math.isfinite(platt.intercept)):
            raise HeadError(f"calibration.{key} in head.json is not finite: fit the head again")
        return platt

    def dump(self) -> dict[str, float]:
        """The entry of a manifest's ``calibration``."""
        return {"slope": self.slope, "intercept": self.intercept}

    def __call__(self, scores: ArrayLike) -> Doubles:
        """Probabilities, elementwise."""
        return sigmoid(self.slope * np.asarray(scores, dtype=np.float64) + self.intercept)


def probabilities(platt: Platt | None, scores_N: Sequence[float | None]) -> tuple[float | None, ...] | None:
    """Of each score that there is; None of an uncalibrated head."""
    if platt is None:
        return None
    return tuple(None if score is None else float(platt(score)) for score in scores_N)


def _all_finite(scores: ArrayLike) -> Doubles:
    scores_N = np.asarray(scores, dtype=np.float64).ravel()
    if not len(scores_N) or not np.isfinite(scores_N).all():
        raise DataError("calibration scores must be finite, and there must be some")
    return scores_N


@dataclass(frozen=True, slots=True)
class Deciles:
    """Where the tenths of the calibration scores end. Scores like them fall into all ten equally often, so live ones
    that don't drifted.
    """

    edges: tuple[float, ...]

    @classmethod
    def fit(cls, scores: ArrayLike) -> Self:
        """Of calibration scores of single responses ``[N]``.

        Raises:
            DataError: none, or some are not finite.
        """
        scores_N = _all_finite(scores)
        return cls(tuple(float(e) for e in np.quantile(scores_N, np.arange(1, 10) / 10)))

    @classmethod
    def load(cls, calibration: Mapping[str, Any]) -> Self | None:
        """Out of a manifest's ``calibration``; None where the head has none, as those fitted by older versions.

        Raises:
            HeadError: not nine ascending finite numbers.
        """
        if "score_deciles" not in calibration:
            return None
        try:
            edges = tuple(float(e) for e in calibration["score_deciles"])
        except (TypeError, ValueError) as error:
            raise HeadError(f"calibration.score_deciles in head.json must be numbers ({error!r})") from None
        if len(edges) != 9 or list(edges) != sorted(edges) or not all(map(math.isfinite, edges)):
            raise HeadError("calibration.score_deciles in head.json must be nine ascending numbers: fit the head again")
        return cls(edges)

    def dump(self) -> dict[str, Any]:
        """The entry of a manifest's ``calibration``."""
        return {"score_deciles": list(self.edges)}

    def tenth(self, score: float) -> int:
        """1 for scores like the lowest tenth of the calibration set, up to 10."""
        return 1 + int(np.searchsorted(self.edges, score, side="right"))

    def quantile(self, score: float) -> float:
        """Share of the calibration scores below ``score``, in (0, 1); beyond the outer tenths as in ``Acceptable``."""
        low, high = self.edges[0], self.edges[-1]
        if score < low:
            return float(0.1 * math.exp((score - low) / max(self.edges[1] - low, TINY)))
        if score > high:
            return float(1 - 0.1 * math.exp((high - score) / max(high - self.edges[-2], TINY)))
        return float(np.interp(score, self.edges, np.arange(1, 10) / 10))


@dataclass(frozen=True, slots=True)
class Acceptable:
    """How acceptable responses of the calibration set are scored: what a threshold costs in false positives.

    Heads fitted before this was kept have it estimated, from the tenths of all scores and the calibrated probability
    at each score; beyond the outer tenths scores are taken to thin out exponentially, as fast as the last tenth begins.
    """

    rates: tuple[float, ...]
    scores: tuple[float, ...]
    estimated: bool = False

    @classmethod
    def fit(cls, scores: ArrayLike) -> Self:
        """Of acceptable calibration scores ``[N]``; only rates of which the set has at least one response.

        Raises:
            DataError: none, or some are not finite.
        """
        scores_N = _all_finite(scores)
        rates = [rate for rate in FALSE_POSITIVE_RATES if rate * len(scores_N) >= 1] or [FALSE_POSITIVE_RATES[-1]]
        return cls(tuple(rates), tuple(float(s) for s in np.quantile(scores_N, rates)))

    @classmethod
    def load(cls, calibration: Mapping[str, Any]) -> Self | None:
        """Out of a manifest's ``calibration``; estimated where it isn't there, None where that can't be done.

        Raises:
            HeadError: an entry that can't be used.
        """
        if "acceptable" not in calibration:
            deciles, platt = Deciles.load(calibration), Platt.load(calibration)
            return cls._estimate(deciles, platt) if deciles and platt else None
        try:
            rates = tuple(float(r) for r in calibration["acceptable"]["rates"])
            scores = tuple(float(s) for s in calibration["acceptable"]["scores"])
        except (TypeError, ValueError, KeyError) as error:
            raise HeadError(f"calibration.acceptable in head.json needs lists rates and scores ({error!r})") from None
        ascending = list(rates) == sorted(set(rates)) and list(scores) == sorted(scores)
        if not rates or len(rates) != len(scores) or not ascending or not all(map(math.isfinite, (*rates, *scores))):
            raise HeadError("calibration.acceptable in head.json must ascend in rates and scores: fit the head again")
        return cls(rates, scores)

    @classmethod
    def _estimate(cls, deciles: Deciles, platt: Platt) -> Self | None:
        edges = np.asarray(deciles.edges)
        tails = np.linspace(-10, 0, 101)  # in widths of the outer inner tenth
        first, last = max(edges[1] - edges[0], TINY), max(edges[-1] - edges[-2], TINY)
        grid = np.concatenate(
            [
                edges[0] + first * tails,
                np.interp(np.linspace(0, 8, 81)[1:], np.arange(9), edges),
                edges[-1] - last * tails[-2::-1],
            ]
        )
        below = np.concatenate([0.1 * np.exp(tails), np.linspace(0.1, 0.9, 81)[1:], 1 - 0.1 * np.exp(tails[-2::-1])])
        share = np.cumsum(np.diff(below) * platt((grid[1:] + grid[:-1]) / 2))
        if not share[-1] > 0:
            return None
        share /= share[-1]
        rates = [rate for rate in FALSE_POSITIVE_RATES if rate >= share[0]]
        return cls(tuple(rates), tuple(float(s) for s in np.interp(rates, share, grid[1:])), estimated=True)

    def dump(self) -> dict[str, Any]:
        """The entry of a manifest's ``calibration``."""
        return {"acceptable": {"rates": list(self.rates), "scores": list(self.scores)}}

    def threshold(self, rate: float) -> float:
        """Score below which the share ``rate`` of acceptable responses lies; between two known rates, between theirs.

        Raises:
            InvalidField: the calibration set is too small for so low a rate, or the rate is above all that are kept.
        """
        if not self.rates[0] <= rate <= self.rates[-1]:
            raise InvalidField(
                f"a false-positive rate of {rate:g} is not known for this head: its calibration tells "
                f"{self.rates[0]:g} to {self.rates[-1]:g}",
                param="false_positives",
            )
        return float(np.interp(math.log(rate), np.log(self.rates), self.scores))


@dataclass(frozen=True, slots=True)
class PairCalibration:
    """What a margin of one head means: its scale, and the probability that the label is right."""

    scale: MarginScale | None
    label: Platt | None

    @classmethod
    def load(cls, calibration: Mapping[str, Any]) -> Self:
        """Out of a manifest's ``calibration``.

        Raises:
            HeadError: names the entry that cannot be used.
        """
        return cls(MarginScale.load(calibration), Platt.load(calibration, "platt_pair"))

    def compare(self, scores_N: Sequence[float | None]) -> PairScores:
        """What the scores of a pair, chosen first, say of it; nothing where one of them is not finite. A tie agrees
        with no label.

        Raises:
            InvalidField: not two scores.
        """
        if len(scores_N) != 2:
            raise InvalidField(f"a pair has two responses, chosen first; this group has {len(scores_N)}")
        chosen, rejected = scores_N
        margin = math.nan if chosen is None or rejected is None else chosen - rejected
        if not math.isfinite(margin):
            return PairScores()
        return PairScores(
            margin=margin,
            margin_scaled=margin / self.scale.std if self.scale else None,
            bin=self.scale.bin(margin) if self.scale else None,
            label_agrees=margin > 0 if margin else None,
            label_probability=self._label_probability(margin),
        )

    def _label_probability(self, margin: float) -> float | None:
        if self.label is None:
            return None
        return float(self.label(margin)) if margin else 0.5
