"""Scores that pairs lack, asked of the service before they are trained on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

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
            for i, reward in zip(bare, self._service.rewards([pairs[i] for i in bare], self._head), strict=True):
                complete[i] = _rewarded(pairs[i], reward)
        known = [pair for pair in complete if not self._hybrid or pair.chosen_score is not None]
        if len(known) < len(pairs):
            metrics.REFUSED_TOTAL.labels(reason="unscored").inc(len(pairs) - len(known))
            LOG.warning("%d pairs can't be scored and are left out", len(pairs) - len(known))
        return self._monitored(known) if self._monitor and known else known

    def _monitored(self, pairs: Sequence[ScoredPair]) -> list[ScoredPair]:
        assert self._service is not None and self._monitor is not None
        items = [(pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
        scores = self._service.scores(items, self._monitor)
        both = zip(scores[::2], scores[1::2], strict=True)
        return [
            replace(pair, monitor=None if chosen is None or rejected is None else (chosen, rejected))
            for pair, (chosen, rejected) in zip(pairs, both, strict=True)
        ]


class Recheck:
    """How many labels heads agree with when the policy has learnt from them: heads and states as they are now.

    Args:
        head: hybrid head.
        monitor: a pointwise head that nobody updates, or None.
    """

    def __init__(self, service: Service, head: str, monitor: str | None) -> None:
        self._service, self._head, self._monitor = service, head, monitor

    def __call__(self, pairs: Sequence[ScoredPair]) -> dict[str, float]:
        """``hybrid/accuracy_after`` and ``monitor/accuracy_after`` of at least one pair."""
        items = [(pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
        heads = {"hybrid": self._head} | ({"monitor": self._monitor} if self._monitor else {})
        return {f"{name}/accuracy_after": _agreement(self._service.scores(items, head)) for name, head in heads.items()}


def _agreement(scores: Sequence[float | None]) -> float:
    """Share of pairs with the higher score for chosen; chosen and rejected alternate. One that can't be scored
    counts as wrong.
    """
    both = list(zip(scores[::2], scores[1::2], strict=True))
    return sum(chosen is not None and rejected is not None and chosen > rejected for chosen, rejected in both) / len(
        both
    )


def _rewarded(pair: ScoredPair, reward: dict[str, Any]) -> ScoredPair:
    return replace(
        pair,
        confidence=reward.get("confidence") if pair.confidence is None else pair.confidence,
        chosen_score=reward.get("chosen_score"),
        rejected_score=reward.get("rejected_score"),
        policy_version=reward["policy_version"],
    )
