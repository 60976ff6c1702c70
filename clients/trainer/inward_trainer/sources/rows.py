"""Pairs from JSONL or Parquet, in an order that a seed decides, epoch after epoch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inward_trainer.errors import DataError
from inward_trainer.pairs import Prompt, ScoredPair, read_row
from inward_trainer.sources.base import Cursor, Order, Taken


class Rows:
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
    """All pairs of a file; a row's id is its number, from 0.

    Raises:
        DataError: the file or a row can't be used.
    """
    return [read_row(row, str(i)) for i, row in enumerate(read_table(path))]


def read_prompts(path: Path) -> list[Prompt]:
    """The different prompts of a file (``prompt`` or ``messages`` of each row), in their order.

    Raises:
        DataError: the file or a row can't be used.
    """
    prompts: dict[str, Prompt] = {}
    for i, row in enumerate(read_table(path)):
        prompt = read_row({**row, "chosen": "", "rejected": ""}, str(i)).prompt
        prompts.setdefault(json.dumps(prompt), prompt)
    return list(prompts.values())


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL or Parquet file.

    Raises:
        DataError: there is no such file, or a line is no JSON object.
    """
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
        return rows
    return [
        _line(path, number, line) for number, line in enumerate(path.read_text("utf-8").split("\n"), 1) if line.strip()
    ]


def _line(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number}: not a JSON object")
    return row
