"""Which gamma each pair of a step gets: the ablations of arXiv 2503.10093."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from inward_trainer.errors import DataError
from inward_trainer.pairs import ScoredPair

Mode = Literal["plain", "fixed", "pair", "batch"]
Scale = Literal["service", "squashed", "raw"]


@dataclass(frozen=True, slots=True)
class Confidence:
    """How gamma is found.

    ``mode``: ``plain`` is 1 (DPO), ``fixed`` is ``gamma``, ``pair`` is each pair's own, ``batch`` the mean of those
    over the optimiser step (the authors' code has one value per batch). ``scale``: ``service`` takes the confidence
    that came with the pair; ``squashed`` and ``raw`` work it out from the two rewards, ``sigmoid(alpha (sigmoid(R_c) -
    sigmoid(R_r)))`` and ``sigmoid(alpha (R_c - R_r))``. Below ``floor`` it is never; a floor of 0 lets gamma say that a
    label is wrong.
    """

    mode: Mode = "pair"
    gamma: float = 0.9
    scale: Scale = "service"
    alpha: float = 7.5
    floor: float = 0.5

    @property
    def reads_scores(self) -> bool:
        """Whether pairs need scores of a hybrid head at all."""
        return self.mode in ("pair", "batch")

    def __call__(self, pairs: Sequence[ScoredPair]) -> list[float]:
        """Gamma of each pair of one optimiser step.

        Raises:
            DataError: a pair lacks what its gamma is made from.
        """
        if not self.reads_scores:
            return [1.0 if self.mode == "plain" else self.gamma] * len(pairs)
        gammas = [self._of(pair) for pair in pairs]
        return [math.fsum(gammas) / len(gammas)] * len(gammas) if self.mode == "batch" else gammas

    def _of(self, pair: ScoredPair) -> float:
        if self.scale == "service":
            if pair.confidence is None:
                raise DataError(
                    f"pair {pair.id} has no confidence: give the service's --url and --head, or --confidence plain or "
                    "fixed"
                )
            return max(pair.confidence, self.floor)
        if pair.chosen_score is None or pair.rejected_score is None:
            raise DataError(f"pair {pair.id} has no scores, from which --scale {self.scale} works out gamma")
        chosen, rejected = pair.chosen_score, pair.rejected_score
        if self.scale == "squashed":
            chosen, rejected = _sigmoid(chosen), _sigmoid(rejected)
        return max(_sigmoid(self.alpha * (chosen - rejected)), self.floor)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
