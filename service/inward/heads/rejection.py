"""Early rejection (arXiv 2410.20290): which of N responses are drawn to their end, by their running scores. Pure.

At a decision point those that still run are compared, each by its score after exactly so many tokens. That is when all
of them have got there, or have ended before: so it does not matter how fast which of them is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

Rule = Callable[[int, Mapping[int, float]], set[int]]
"""Which of the running scores, by index, are rejected at a decision point, by its number."""


def keep_share(keep: float) -> Rule:
    """Rejects all but the share ``keep``, rounded up, of those with the highest scores; of equals the later ones."""

    def rejected(point: int, scores: Mapping[int, float]) -> set[int]:
        best = sorted(scores, key=lambda i: (-_number(scores[i]), i))
        return set(best[max(1, math.ceil(keep * len(best) - 1e-9)) :])

    return rejected


def keep_near(gaps: Sequence[float]) -> Rule:
    """Rejects those that lie by more than the point's gap below the highest."""

    def rejected(point: int, scores: Mapping[int, float]) -> set[int]:
        highest = max(map(_number, scores.values()))
        if highest == -math.inf:
            return set()
        return {i for i, score in scores.items() if _number(score) < highest - gaps[point]}

    return rejected


@dataclass(slots=True)
class _Progress:
    scores: list[float] = field(default_factory=list)
    """At the decision points that it has reached."""
    ended: bool = False


class Rejecting:
    """The decisions on ``n`` responses at the points ``at``, in tokens, ascending."""

    def __init__(self, n: int, at: Sequence[int], rule: Rule) -> None:
        self.at = tuple(at)
        self._rule = rule
        self._responses = {i: _Progress() for i in range(n)}
        self._next = 0

    def reached(self, i: int, score: float) -> None:
        """Response ``i`` has as many tokens as its next point, and this running score there."""
        if i in self._responses:
            self._responses[i].scores.append(score)

    def ended(self, responses: Iterable[int]) -> None:
        """They get no further; points that they have reached count."""
        for i in responses:
            if i in self._responses:
                self._responses[i].ended = True

    def undecided(self, i: int) -> bool:
        """Whether a later decision may reject response ``i``: it has reached a point at which nothing was decided yet,
        or goes on.
        """
        own = self._responses.get(i)
        return own is not None and (not own.ended or len(own.scores) > self._next)

    @property
    def decided(self) -> int:
        """How many of the points have passed."""
        return self._next

    def decide(self) -> dict[int, tuple[int, float]]:
        """Those that are rejected now, with the point's tokens and their score there."""
        rejected: dict[int, tuple[int, float]] = {}
        while self._next < len(self.at) and self._all_there():
            here = self._next
            scores = {i: own.scores[here] for i, own in self._responses.items() if len(own.scores) > here}
            for i in self._rule(here, scores) if scores else ():
                del self._responses[i]
                rejected[i] = (self.at[here], scores[i])
            self._next += 1
        return rejected

    def _all_there(self) -> bool:
        return all(own.ended or len(own.scores) > self._next for own in self._responses.values())


def _number(score: float) -> float:
    return -math.inf if math.isnan(score) else score
