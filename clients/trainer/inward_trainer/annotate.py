"""Scores that pairs lack, asked of the service before they are trained on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from inward_client import RewardPair
from inward_trainer import metrics
from inward_trainer.pairs import ScoredPair
from inward_trainer.service import Service

LOG = logging.getLogger(__name__)


class Annotator:
    """Completes pairs: hybrid scores and confidence where they are missing, and the monitor head's scores.

    Args:
        service: None leaves pairs as they are.
        head: hybrid head; None is the service's choice.
        monitor: a pointwise head that nobody updates; None reads none.
        hybrid: whether hybrid scores are wanted at all.
    """

    def __init__(
        self, service: Service | None, *, head: str | None = None, monitor: str | None = None, hybrid: bool = True
    ) -> None:
        self._service, self._head, self._monitor, self._hybrid = service, head, monitor, hybrid

    def __call__(self, pairs: Sequence[ScoredPair]) -> list[ScoredPair]:
        """The pairs in their order, without those that the service can't score."""
        if self._service is None:
            return list(pairs)
        complete = list(pairs)
        if self._hybrid and (
            bare := [i for i, pair in enumerate(pairs) if pair.confidence is None or pair.chosen_score is None]
        ):
            found = self._service.rewards([pairs[i] for i in bare], self._head)
            for i, (reward, version) in zip(bare, found, strict=True):
                complete[i] = _rewarded(pairs[i], reward, version)
        known = [pair for pair in complete if not self._hybrid or pair.chosen_score is not None]
        if len(known) < len(pairs):
            metrics.REFUSED_TOTAL.labels(reason="unscored").inc(len(pairs) - len(known))
            lost = ", ".join(pair.id for pair in complete if pair.chosen_score is None)
            LOG.warning("%d pairs can't be scored and are left out: %s", len(pairs) - len(known), lost)
        return self._monitored(known) if self._monitor and known else known

    def _monitored(self, pairs: Sequence[ScoredPair]) -> list[ScoredPair]:
        assert self._service is not None and self._monitor is not None
        return [
            replace(pair, monitor=None if chosen is None or rejected is None else (chosen, rejected))
            for pair, (chosen, rejected) in zip(pairs, self._service.both_scores(pairs, self._monitor), strict=True)
        ]


class Judges:
    """What heads say of pairs with the policy as it is in the service now.

    Args:
        head: hybrid head.
        monitor: a pointwise head that nobody updates, or None.
    """

    def __init__(self, service: Service, head: str, monitor: str | None) -> None:
        self._service = service
        self._heads = {"hybrid": head} | ({"monitor": monitor} if monitor else {})

    def scores(self, pairs: Sequence[ScoredPair]) -> dict[str, list[tuple[float | None, float | None]]]:
        """Of chosen and rejected, by ``hybrid`` and ``monitor``."""
        return {name: self._service.both_scores(pairs, head) for name, head in self._heads.items()}

    def agreement(self, pairs: Sequence[ScoredPair]) -> dict[str, float]:
        """``hybrid/accuracy_after`` and ``monitor/accuracy_after``: with how many labels of at least one pair each
        agrees when the policy has learnt from them.
        """
        judged = self.scores(pairs)
        return {f"{name}/accuracy_after": sum(map(agrees, both)) / len(both) for name, both in judged.items()}


def agrees(scores: tuple[float | None, float | None]) -> bool:
    """Whether chosen has the higher score; a pair that can't be scored counts as wrong."""
    chosen, rejected = scores
    return chosen is not None and rejected is not None and chosen > rejected


def _rewarded(pair: ScoredPair, reward: RewardPair, policy_version: str) -> ScoredPair:
    return replace(
        pair,
        confidence=reward.confidence if pair.confidence is None else pair.confidence,
        chosen_score=reward.chosen_score,
        rejected_score=reward.rejected_score,
        policy_version=policy_version,
    )
