"""Where a row keeps its prompt, its chosen and its rejected answer: the layouts in which preference data are
published, without any library.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from inward_client.rows.errors import DataError
from inward_client.rows.messages import Prompt, given, is_messages, text_or_messages
from inward_client.rows.pair import (
    UNCARRIED,
    Pair,
    Row,
    alpaca_prompt,
    check_unicode,
    get,
    is_transcript,
    paired,
    text_of,
    transcript,
    which,
)

CONTEXT = frozenset({"system", *UNCARRIED})
"""Columns that every layout may have beside its own."""
ALIKE = frozenset({"system_prompt", "system_message", "context", "functions", "chat_template_kwargs"})
"""Columns that no layout reads, under whose names context is kept."""
LOOKED_AT = 100
"""Rows of a table from which its layout is recognised."""
PARSE = "store them as lists, or give --parse-json where there is that option"
ADVICE = "Give the columns the names of one of them"
"""What to do about a layout that nobody knows, where a caller does not say more."""
AUTO = "auto"
"""Instead of a layout's name: recognise it."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How rows of one kind of dataset are read."""

    name: str
    says: str
    own: frozenset[str]
    """Columns that hold the pair."""
    fits: Callable[[Row], bool]
    read: Callable[[Row], Pair]

    @property
    def columns(self) -> frozenset[str]:
        """All that are read."""
        return self.own | CONTEXT


@dataclass(frozen=True, slots=True)
class PairReader:
    """Reads the pairs of one table.

    Args:
        rename: a layout's column → the dataset's; an empty name says that there is none.
        parse_json: messages may be stored as JSON text.
    """

    layout: Layout
    rename: Mapping[str, str] = field(default_factory=dict)
    parse_json: bool = False

    @property
    def taken(self) -> frozenset[str]:
        """The dataset's names of the columns that are read."""
        return frozenset(self.rename.get(name, name) for name in self.layout.columns)

    def pair(self, row: Row) -> Pair:
        """The pair in a row.

        Raises:
            DataError: names the column that is wrong.
        """
        row = renamed(row, self.rename)
        if self.parse_json:
            row = {name: parsed(value) if name in self.layout.columns else value for name, value in row.items()}
        pair = self.layout.read(row)
        check_unicode(pair.body())
        return pair

    def notes(self, rows: Sequence[Row]) -> list[str]:
        """What a reader of these rows should be told: columns that look like a part of the pair and are not read, and
        messages that are stored as text.
        """
        suspects = sorted((COLUMNS | ALIKE) - self.taken - set(self.rename))
        unread = [name for name in suspects if any(given(row.get(name)) for row in rows)]
        rows = [renamed(row, self.rename) for row in rows]
        stored = [name for name in sorted(self.layout.columns) if any(is_json_messages(row.get(name)) for row in rows)]
        told = []
        if unread:
            names = ", ".join(map(repr, unread))
            told.append(f"not read: the columns {names} (layout {self.layout.name})")
        if stored and not self.parse_json:
            names = ", ".join(repr(self.rename.get(name, name)) for name in stored)
            told.append(f"messages are stored as JSON text in {names} and are read as plain text: {PARSE}")
        return told


def recognise(
    rows: Sequence[Row],
    rename: Mapping[str, str] | None = None,
    *,
    name: str = AUTO,
    parse_json: bool = False,
    advice: str = ADVICE,
) -> PairReader:
    """The reader of the first layout that fits most of the rows, or of the layout that is named.

    Args:
        advice: what the caller's user can do where none fits.

    Raises:
        DataError: none fits, or none has the name; says what columns there are and what is known.
    """
    rename = rename or {}
    if unknown := sorted(set(rename) - COLUMNS):
        raise DataError(f"no layout has a column {unknown[0]!r}: rename to one of {', '.join(sorted(COLUMNS))}")
    if name != AUTO:
        if name not in LAYOUTS:
            raise DataError(f"there is no layout {name!r}: {AUTO}, {', '.join(LAYOUTS)}")
        return PairReader(LAYOUTS[name], rename, parse_json)
    plain = [renamed(row, rename) for row in rows]
    if parse_json:
        plain = [{column: parsed(value) for column, value in row.items()} for row in plain]
    counts = {layout.name: sum(layout.fits(row) for row in plain) for layout in LAYOUTS.values()}
    best = max(counts, key=lambda one: counts[one])
    if not counts[best] or 2 * counts[best] < len(rows):
        found = ", ".join(sorted({str(column) for row in rows for column in row})) or "none"
        known = "\n".join(f"  {layout.name:9} {layout.says}" for layout in LAYOUTS.values())
        stored = sorted({str(column) for row in plain for column, value in row.items() if is_json_messages(value)})
        hint = f"Messages are stored as JSON text in {', '.join(map(repr, stored))}: {PARSE}.\n" if stored else ""
        raise DataError(
            f"no layout of preference pairs recognised; the columns are: {found}. Known are\n{known}\n{hint}{advice}"
        )
    return PairReader(LAYOUTS[best], rename, parse_json)


def read_pair(row: Row) -> Pair:
    """The pair in a single row, whose layout is recognised from itself.

    Raises:
        DataError: no layout fits, or names the column that is wrong.
    """
    fitting = next((layout for layout in LAYOUTS.values() if layout.fits(row)), None)
    if fitting is None and (stored := next((name for name, value in row.items() if is_json_messages(value)), None)):
        raise DataError(f"{stored!r} holds messages as JSON text: {PARSE}", column=stored)
    return PairReader(fitting or LAYOUTS["trl"]).pair(row)


def notes(rows: Sequence[Row]) -> list[str]:
    """What a reader of single rows should be told; see ``PairReader.notes``."""
    try:
        return recognise(rows).notes(rows)
    except DataError:  # rows of several layouts
        return []


def renamed(row: Row, rename: Mapping[str, str]) -> Row:
    """The row with the layout's names for its columns."""
    if not rename:
        return row
    return {**row, **{ours: row.get(theirs) if theirs else None for ours, theirs in rename.items()}}


def parsed(value: Any) -> Any:
    """The messages that a text holds as JSON, else the value."""
    return json.loads(value) if is_json_messages(value) else value


def is_json_messages(value: Any) -> bool:
    """Whether a text is the JSON of a message, or of a list of them."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return False
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return False
    return is_messages(found if isinstance(found, list) else [found])


def _both(row: Row, prompt: Prompt | None) -> Pair:
    return paired(row, prompt, get(row, "chosen"), get(row, "rejected"), ("chosen", "rejected"))


def _of(column: str) -> Callable[[Row], Pair]:
    return lambda row: _both(row, text_or_messages(get(row, column), column))


def _hh(row: Row) -> Pair:
    prompt = transcript(text_of(row, "prompt")) if row.get("prompt") is not None else None
    chosen, rejected = (_spoken(get(row, name), name, prompt is not None) for name in ("chosen", "rejected"))
    return paired(row, prompt, chosen, rejected, ("chosen", "rejected"))


def _spoken(said: Any, column: str, plain: bool) -> Any:
    """An answer in the form of HH: a whole transcript, or (where there is a prompt apart) its text."""
    if not isinstance(said, str) or (plain and not is_transcript(said)):
        return said
    try:
        return transcript(said)
    except DataError as error:
        raise DataError(f"{column!r}: {error.reason}", column=column) from None


def _pku(row: Row) -> Pair:
    column = "safer_response_id" if row.get("safer_response_id") is not None else "better_response_id"
    better = which(get(row, column))
    if better is None:
        raise DataError(f"{column!r} must be 0 or 1", column=column)
    names = f"response_{better}", f"response_{1 - better}"
    prompt = text_or_messages(get(row, "prompt"), "prompt")
    return paired(row, prompt, get(row, names[0]), get(row, names[1]), names)


def _has_pair(row: Row) -> bool:
    return row.get("chosen") is not None and row.get("rejected") is not None


def _asks(row: Row) -> bool:
    """Whether ``messages`` are what was asked, and not the chosen conversation once more."""
    turns = row.get("messages")
    return is_messages(turns) and turns[-1].get("role") != "assistant"  # type: ignore[index]


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(
            "hh",
            "chosen and rejected as 'Human: … Assistant: …' transcripts, or such a prompt and two answers",
            frozenset({"prompt", "chosen", "rejected"}),
            lambda row: _has_pair(row) and is_transcript(row.get("prompt") or row["chosen"]),
            _hh,
        ),
        Layout(
            "sharegpt",
            "conversations of {from, value} turns, and chosen and rejected as one turn each",
            frozenset({"conversations", "chosen", "rejected"}),
            lambda row: _has_pair(row) and is_messages(row.get("conversations")),
            _of("conversations"),
        ),
        Layout(
            "pku",
            "prompt, response_0, response_1, and safer_response_id (or better_response_id)",
            frozenset({"prompt", "response_0", "response_1", "safer_response_id", "better_response_id"}),
            lambda row: (
                {"prompt", "response_0", "response_1"} <= row.keys()
                and bool({"safer_response_id", "better_response_id"} & row.keys())
            ),
            _pku,
        ),
        Layout(
            "trl",
            "prompt, chosen, rejected, each text or chat messages",
            frozenset({"prompt", "chosen", "rejected"}),
            lambda row: _has_pair(row) and row.get("prompt") is not None,
            _of("prompt"),
        ),
        Layout(
            "alpaca",
            "instruction (with input and history), chosen, rejected",
            frozenset({"instruction", "input", "history", "chosen", "rejected"}),
            lambda row: _has_pair(row) and row.get("instruction") is not None,
            lambda row: _both(row, alpaca_prompt({**row, "instruction": get(row, "instruction")})),
        ),
        Layout(
            "question",
            "question, chosen, rejected, each text or chat messages",
            frozenset({"question", "chosen", "rejected"}),
            lambda row: _has_pair(row) and row.get("question") is not None,
            _of("question"),
        ),
        Layout(
            "messages",
            "messages that end with the user, and chosen and rejected answers to them",
            frozenset({"messages", "chosen", "rejected"}),
            lambda row: _has_pair(row) and _asks(row),
            _of("messages"),
        ),
        Layout(
            "chat",
            "chosen and rejected as whole conversations that part at the last turn",
            frozenset({"chosen", "rejected"}),
            lambda row: is_messages(row.get("chosen")) and is_messages(row.get("rejected")),
            lambda row: _both(row, None),
        ),
    )
}
COLUMNS = frozenset().union(*(layout.columns for layout in LAYOUTS.values()))
"""All that some layout reads."""
