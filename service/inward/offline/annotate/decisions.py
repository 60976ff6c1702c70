"""What people decided about labels: ``right``, ``flip`` or ``drop``, in a CSV file that the page gives out.

    source,row,key,decision
    in,17,5f0c…,flip

A pair is known by its ``key``, a hash of its texts, so that rows may have moved; ``source`` and ``row`` are for people.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from inward.errors import DataError
from inward.offline.annotate.duplicates import hashed, text_of
from inward.offline.annotate.scorer import COLUMNS
from inward_client import rows as rows_module
from inward_client.rows import Pair, PairReader, Row, which

Decision = Literal["right", "flip", "drop"]
Decided = Mapping[str, Decision]
"""All decisions of a file, by the key of the pair."""
FIELDS = ("source", "row", "key", "decision")
"""Of the file."""
SWAPPED = ("chosen_score", "rejected_score")
UNKNOWN = ("margin_bin", "confidence")
"""Columns that can't be worked out for the other label."""

TRUTHS = {"true": True, "false": False}


def key_of(pair: Pair) -> str:
    """Of a pair with its label: the other way round it has another one."""
    return f"{hashed(text_of(pair.prompt), pair.chosen, pair.rejected):016x}"


def read(path: Path) -> Decided:
    """The decisions of a file; rows without one are left out.

    Raises:
        DataError: names the line, and what is wrong with it.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return dict(_checked(path, csv.DictReader(file)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} can't be read as a file of decisions: {error}") from None


def _checked(path: Path, rows: csv.DictReader[str]) -> Iterator[tuple[str, Decision]]:
    if missing := {"key", "decision"} - set(rows.fieldnames or ()):
        raise DataError(f"{path} has no column {', '.join(sorted(missing))}: it should have {', '.join(FIELDS)}")
    seen: dict[str, tuple[int, str]] = {}
    for row in rows:
        said, key = (row["decision"] or "").strip().lower(), (row["key"] or "").strip().lower()
        if not said:
            continue
        decision = next((one for one in get_args(Decision) if one == said), None)
        if decision is None:
            raise DataError(f"{path}, line {rows.line_num}: {said!r} is none of {', '.join(get_args(Decision))}")
        before = seen.setdefault(key, (rows.line_num, decision))
        if before[1] != decision:
            raise DataError(
                f"{path}: line {before[0]} says {before[1]}, line {rows.line_num} says {decision} of the same pair"
            )
        yield key, decision


@dataclass(slots=True)
class Applied:
    """What became of the rows of an input, counted as they go by."""

    rows: int = 0
    unread: int = 0
    """Rows that hold no pair, and pass as they are."""
    right: int = 0
    flip: int = 0
    drop: int = 0
    incomplete: int = 0
    """Flipped rows that had a bin or a confidence, which the other label does not tell."""
    found: set[str] = field(default_factory=set)
    """Keys of pairs that were decided on."""

    def text(self, decided: Decided) -> str:
        """A line or two for the terminal."""
        lines = [
            f"{len(decided)} decisions: {self.flip} rows flipped, {self.drop} dropped, {self.right} right as they are; "
            f"{self.rows - self.drop} of {self.rows} rows written"
        ]
        if self.unread:
            lines.append(f"{self.unread} rows hold no pair and were written as they are")
        if self.incomplete:
            lines.append(
                f"{self.incomplete} flipped rows have no {' and '.join(UNKNOWN)} any more: annotate the corrected file"
            )
        return "\n".join(lines)


def apply(
    rows: Iterable[Row | rows_module.DataError], reader: PairReader, decided: Decided, prefix: str, told: Applied
) -> Iterator[Row]:
    """The rows that are kept, the labels of some of them turned round. Rows that repeat a pair share its decision.

    Args:
        prefix: of the columns of an annotation, where the rows have them.
        told: is counted up.

    Raises:
        DataError: a row can't be read.
    """
    for row in rows:
        if isinstance(row, rows_module.DataError):
            raise row
        told.rows += 1
        try:
            key = key_of(reader.pair(row))
        except rows_module.DataError:
            told.unread += 1
            yield row
            continue
        decision = decided.get(key)
        if decision is not None:
            told.found.add(key)
            setattr(told, decision, getattr(told, decision) + 1)
        if decision == "flip":
            told.incomplete += any(_cell(row, prefix, name) is not None for name in UNKNOWN)
            yield turned(row, reader, prefix)
        elif decision != "drop":
            yield row


def turned(row: Row, reader: PairReader, prefix: str = "") -> Row:
    """A row with the other label; of its annotation what follows from that, and null for what does not."""
    row = _swapped(dict(row), reader)
    given: dict[str, Any] = {name: cell for name in COLUMNS if (cell := _cell(row, prefix, name)) is not None}
    other: dict[str, Any] = {name: None for name in UNKNOWN if name in given}
    for name in ("margin", "margin_scaled"):
        if name in given:
            other[name] = -given[name]
    if "margin" in given and given["margin"] == given.get("margin_bin"):
        other["margin"] = None  # it is the bin, as with --trl
    if "label_probability" in given:
        other["label_probability"] = 1 - given["label_probability"]
    if "label_agrees" in given:
        other["label_agrees"] = not given["label_agrees"]
    if all(name in given for name in SWAPPED):
        other |= {SWAPPED[0]: given[SWAPPED[1]], SWAPPED[1]: given[SWAPPED[0]]}
    return {**row, **{prefix + name: value for name, value in other.items()}}


def _cell(row: Row, prefix: str, name: str) -> float | bool | None:
    """What an annotation wrote, as a number or a truth value, also where a CSV file made text of it; None of anything
    else, which is a column of the user's own.
    """
    value = row.get(prefix + name)
    if name == "label_agrees":
        value = TRUTHS.get(value.lower()) if isinstance(value, str) else value
        return value if isinstance(value, bool) else None
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _swapped(row: dict[str, Any], reader: PairReader) -> dict[str, Any]:
    def theirs(column: str) -> str:
        return reader.rename.get(column, column)

    if reader.layout.name != "pku":
        chosen, rejected = theirs("chosen"), theirs("rejected")
        row[chosen], row[rejected] = row[rejected], row[chosen]
        return row
    # PKU's layout names the better one by its number
    column = theirs("safer_response_id")
    if row.get(column) is None:
        column = theirs("better_response_id")
    row[column] = type(row[column])(1 - int(which(row[column]) or 0))
    return row
