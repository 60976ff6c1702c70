"""Pairs that the policy makes itself: N samples of a prompt, ranked by the service, best against worst."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from inward_trainer.errors import DataError, ServiceError
from inward_trainer.pairs import Prompt, ScoredPair
from inward_trainer.service import Drawn, Service
from inward_trainer.sources.base import Cursor, Order, Taken

LOG = logging.getLogger(__name__)
SAMPLING = {"temperature": 1.4, "top_p": 0.95, "top_k": 8, "repetition_penalty": 1.2, "max_tokens": 256}
"""Those of arXiv 2503.10093."""
UNUSABLE = frozenset({400, 413, 422})
"""Statuses with which the service refuses a prompt, rather than us."""


class Samples:
    """The cursor is the number of prompts used, over all epochs. The same seed draws the same samples of the same
    policy.

    Args:
        n: samples of each prompt.
        head: hybrid head that ranks them and gives the confidence; None is the service's choice of a ranker.
        epochs: how often each prompt is used; None is for ever.
    """

    live = True

    def __init__(
        self,
        service: Service,
        prompts: Sequence[Prompt],
        *,
        n: int = 8,
        sampling: Mapping[str, Any] = SAMPLING,
        head: str | None = None,
        epochs: int | None = None,
        seed: int = 0,
    ) -> None:
        if not prompts:
            raise DataError("there are no prompts to sample from")
        self._service, self._prompts, self._n, self._sampling, self._head = service, prompts, n, dict(sampling), head
        self._order, self._seed = Order(len(prompts), epochs=epochs, seed=seed), seed

    def take(self, n: int, cursor: Cursor) -> Taken:
        """One pair of each prompt whose samples differ in their scores; prompts that give none are passed over."""
        start = int(cursor or 0)
        while True:
            places = self._order.after(start, n)
            drawn = self._service.many(self._pair, list(enumerate(places, start)))
            start += len(places)
            if pairs := tuple(pair for pair in drawn if pair is not None):
                return Taken(pairs, start)

    def settle(self, receipts: Sequence[str]) -> None:
        """Nothing: nobody keeps samples."""

    def _pair(self, numbered: tuple[int, int]) -> ScoredPair | None:
        position, place = numbered
        prompt = self._prompts[place]
        sampling = self._sampling | {"seed": (1_000_003 * self._seed + position) % 2**32}
        try:
            drawn = self._service.draw(prompt, self._n, sampling, self._head)
        except ServiceError as error:
            if error.status not in UNUSABLE:
                raise
            LOG.warning("prompt %d is left out: %s", place, error)
            return None
        return best_against_worst(str(position), prompt, drawn) if drawn else None


def best_against_worst(id: str, prompt: Prompt, drawn: Drawn) -> ScoredPair | None:
    """The pair of the extremes; None where all samples score the same."""
    if drawn.scores[0] <= drawn.scores[-1]:
        return None
    return ScoredPair(
        id=id,
        prompt=prompt,
        chosen=drawn.texts[0],
        rejected=drawn.texts[-1],
        confidence=drawn.confidence,
        chosen_score=drawn.scores[0],
        rejected_score=drawn.scores[-1],
        finished=(drawn.finished[0], drawn.finished[-1]),
        policy_version=drawn.policy_version,
    )
