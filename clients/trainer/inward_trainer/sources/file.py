"""Pairs from a file, in an order that a seed decides, epoch after epoch."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from inward_client import rows
from inward_trainer.errors import DataError
from inward_trainer.pairs import Prompt, ScoredPair, read_row
from inward_trainer.sources.base import Cursor, Order, Taken

LOG = logging.getLogger(__name__)
T = TypeVar("T")


class FilePairs:
    """The cursor is the number of pairs given, over all epochs.

    Args:
        pairs: at least one.
        epochs: how often each is given; None is for ever.
        seed: of the order.
    """

    live = False

    def __init__(self, pairs: Sequence[ScoredPair], *, epochs: int | None = None, seed: int = 0) -> None:
        if not pairs:
            raise DataError("there are no pairs to train on")
        self._pairs, self._order = pairs, Order(len(pairs), epochs=epochs, seed=seed)

    def take(self, n: int, cursor: Cursor) -> Taken:
        """The next pairs of the epoch, and of the one after it."""
        start = int(cursor or 0)
        pairs = tuple(self._pairs[place] for place in self._order.after(start, n))
        return Taken(pairs, start + len(pairs))

    def settle(self, receipts: Sequence[str]) -> None:
        """Nothing: rows stay where they are."""


def read_pairs(path: Path) -> list[ScoredPair]:
    """All pairs of a file or folder, in any layout; a row's id is its number, from 0, among those that can be read.

    Raises:
        DataError: the file can't be used, or a score in it.
    """
    return [read_row(row, str(i)) for i, row in enumerate(read_table(path))]


def read_prompts(path: Path) -> list[Prompt]:
    """The different prompts of a file, in their order; see ``read_table``."""
    prompts = {json.dumps(prompt): prompt for prompt in _collected(path, rows.read_prompt)}
    return list(prompts.values())


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a file or folder that hold a pair. Others are left out, which the log says with the reason.

    Raises:
        DataError: there is no such file, or no row that can be read.
    """

    def checked(row: dict[str, Any]) -> dict[str, Any]:
        rows.read_pair(row)
        return row

    table = _collected(path, checked)
    for note in rows.notes(table[: rows.LOOKED_AT]):
        LOG.warning(note)
    return table


def _collected(path: Path, read: Callable[[dict[str, Any]], T]) -> list[T]:
    try:
        found = rows.collect(path, read)
    except rows.DataError as error:
        raise DataError(error.message) from None
    for warning in found.warnings():
        LOG.warning(warning)
    return found.values
