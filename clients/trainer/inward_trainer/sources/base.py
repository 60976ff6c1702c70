"""What the loop wants of a source."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from inward_trainer.pairs import ScoredPair

Cursor = Any
"""How far a source was read, as JSON; None is its beginning. Only the source knows what it means."""


class Ended(Exception):
    """The source has no more pairs."""


@dataclass(frozen=True, slots=True)
class Taken:
    """Pairs, where to go on after them, and the receipts with which their source is told that they were used."""

    pairs: tuple[ScoredPair, ...]
    cursor: Cursor
    receipts: tuple[str, ...] = ()


class Source(Protocol):
    """Pairs in an order of its own. The loop writes down what it took and how far it came, so a source remembers
    nothing.
    """

    live: bool
    """Whether its pairs were made by a policy that the trainer moves, so that their age matters."""

    def take(self, n: int, cursor: Cursor) -> Taken:
        """The next ``n`` pairs after ``cursor``, or fewer, but at least one.

        Raises:
            Ended: there are none.
        """
        ...

    def settle(self, receipts: Sequence[str]) -> None:
        """A checkpoint holds what was learnt from these (or they were refused): nobody needs them any more. May be
        told twice.
        """
        ...


class Order:
    """Places of ``n`` things, epoch after epoch, each epoch in an order of its own that the seed decides.

    Args:
        epochs: how often each place comes; None is for ever.
    """

    def __init__(self, n: int, *, epochs: int | None = None, seed: int = 0) -> None:
        self._n, self._epochs, self._seed = n, epochs, seed
        self._shuffled: tuple[int, list[int]] = (-1, [])

    def after(self, start: int, count: int) -> list[int]:
        """Up to ``count`` places after the first ``start``.

        Raises:
            Ended: the last epoch is over.
        """
        end = start + count if self._epochs is None else min(start + count, self._epochs * self._n)
        if end <= start:
            raise Ended
        return [self._at(position) for position in range(start, end)]

    def _at(self, position: int) -> int:
        epoch, i = divmod(position, self._n)
        if self._shuffled[0] != epoch:
            order = list(range(self._n))
            random.Random(f"{self._seed}/{epoch}").shuffle(order)
            self._shuffled = epoch, order
        return self._shuffled[1][i]
