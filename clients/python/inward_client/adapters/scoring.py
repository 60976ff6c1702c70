"""A score for each completion, or None: one that can't be scored is never an error for those beside it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from inward_client.aio import AsyncInward
from inward_client.answers import Score
from inward_client.errors import InvalidField, ServerError, StatusError, TooLarge

LOG = logging.getLogger(__name__)
Item = dict[str, Any]
T = TypeVar("T")


def readable(make: Callable[..., Item], rows: Iterable[tuple[Any, ...]], what: str) -> list[Item | None]:
    """What ``make`` makes of each row's arguments; None, and a line in the log, where it can't."""
    return [_made(make, row, f"{what} {i}") for i, row in enumerate(rows)]


def in_place(items: Sequence[Item | None], found: Iterable[T]) -> list[T | None]:
    """What was found for the items that are not None, in their order, each in its item's place."""
    values = iter(found)
    return [None if item is None else next(values) for item in items]


async def score_each(
    client: AsyncInward, items: Sequence[Item | None], head: str | None, *, truncate: bool = True
) -> list[Score | None]:
    """The head's score of each item, by default the first hybrid head's; None where there is none.

    Raises:
        InwardError: it is not the items' fault, such as a head that is not there.
    """
    usable = [item for item in items if item is not None]
    try:
        if not usable:
            found: list[Score] = []
        elif head is None:
            found = (await client.reward(usable, truncate=truncate)).rewards
        else:
            found = (await client.score(usable, head=head, truncate=truncate)).scores
    except (InvalidField, TooLarge, ServerError) as error:
        blame(error, "items")
        return [None] * len(items)
    return in_place(items, [_scored(score, i) for i, score in enumerate(found)])


def blame(error: StatusError, sent_as: str) -> None:
    """Raises ``error`` again, unless it says that no element of the list ``sent_as`` can be scored."""
    away = isinstance(error, ServerError) and not error.of_one_element
    if away or not (error.param or "").startswith(f"{sent_as}."):
        raise error
    LOG.warning("none of them can be scored; the first because: %s", error.message)


def _made(make: Callable[..., Item], row: tuple[Any, ...], name: str) -> Item | None:
    try:
        return make(*row)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        LOG.warning("%s can't be scored: %s", name, error if isinstance(error, ValueError) else repr(error))
        return None


def _scored(score: Score, i: int) -> Score | None:
    if score.error is None:
        return score
    LOG.warning("item %d can't be scored: %s", i, score.error.message)
    return None
