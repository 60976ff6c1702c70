"""Pairs that the policy makes itself: N samples of a prompt, ranked by the service, best against worst."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from inward_trainer.errors import DataError
from inward_trainer.pairs import Prompt, ScoredPair
from inward_trainer.service import Draw, Drawn, Service
from inward_trainer.sources.base import Cursor, Order, Taken

LOG = logging.getLogger(__name__)
SAMPLING = {"temperature": 1.4, "top_p": 0.95, "top_k": 8, "repetition_penalty": 1.2, "max_tokens": 256}
"""Those of arXiv 2503.10093."""
TOLD_IN_VAIN = 10
"""Rounds of samples without one pair, after which the log says so."""
MOST_IN_VAIN = 100
"""Such rounds after which something must be wrong."""


class SampledPairs:
    """The cursor is the number of prompts used, over all epochs. The same seed draws the same samples of the same
    policy.

    Args:
        n: samples of each prompt.
        head: hybrid head that ranks them and gives the confidence.
        early_rejection: which of them are not drawn to their end, and are in no pair.
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
        head: str,
        early_rejection: Mapping[str, Any] | None = None,
        epochs: int | None = None,
        seed: int = 0,
    ) -> None:
        if not prompts:
            raise DataError("there are no prompts to sample from")
        self._service, self._prompts, self._n, self._sampling, self._head = service, prompts, n, dict(sampling), head
        self._early_rejection = early_rejection
        self._order, self._seed = Order(len(prompts), epochs=epochs, seed=seed), seed

    def take(self, n: int, cursor: Cursor) -> Taken:
        """One pair of each prompt whose samples differ in their scores; prompts that give none are passed over.

        Raises:
            DataError: none of many gives one.
        """
        start = int(cursor or 0)
        for vain in range(MOST_IN_VAIN):
            if vain == TOLD_IN_VAIN:
                LOG.warning("none of the last %d rounds of samples gave a pair", vain)
            draws = [self._draw(start + i, place) for i, place in enumerate(self._order.after(start, n))]
            drawn = self._service.draw(draws, self._n, self._sampling, self._head, self._early_rejection)
            found = [
                best_against_worst(str(start + i), draw.prompt, one)
                for i, (draw, one) in enumerate(zip(draws, drawn, strict=True))
                if one is not None
            ]
            start += len(draws)
            if pairs := tuple(pair for pair in found if pair is not None):
                return Taken(pairs, start)
        raise DataError(
            f"none of the last {MOST_IN_VAIN} rounds of samples gave a pair: the service refuses the prompts, which "
            "warnings say, or all samples of each score the same: see --head, the temperature in --sampling, --samples"
        )

    def settle(self, receipts: Sequence[str]) -> None:
        """Nothing: nobody keeps samples."""

    def _draw(self, position: int, place: int) -> Draw:
        return Draw(place, self._prompts[place], (1_000_003 * self._seed + position) % 2**32)


def best_against_worst(id: str, prompt: Prompt, drawn: Drawn) -> ScoredPair | None:
    """The pair of the extremes; None where all samples score the same."""
    best, worst = drawn.samples[0], drawn.samples[-1]
    if best.score <= worst.score:
        return None
    return ScoredPair(
        id=id,
        prompt=prompt,
        chosen=best.text,
        rejected=worst.text,
        confidence=drawn.confidence,
        chosen_score=best.score,
        rejected_score=worst.score,
        finished=(best.finished, worst.finished),
        policy_version=drawn.policy_version,
        chosen_ids=best.ids,
        rejected_ids=worst.ids,
    )
