"""Where a row keeps its prompt, its chosen and its rejected answer: the layouts in which preference data are
published.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inward.errors import DataError
from inward.offline.data.files import Row

Messages = list[dict[str, str]]
Prompt = str | Messages
TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):[ \t]?")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt and two answers, as ``/margin`` takes them."""

    prompt: Prompt
    chosen: str
    rejected: str

    def body(self) -> dict[str, Any]:
        """As an element of ``pairs``."""
        return {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}


@dataclass(frozen=True, slots=True)
class Layout:
    """How rows of one kind of dataset are read."""

    name: str
    says: str
    columns: frozenset[str]
    """Those that hold the pair."""
    fits: Callable[[Row], bool]
    read: Callable[[Row], Pair]


def read(layout: Layout, row: Row, rename: Mapping[str, str] | None = None) -> Pair:
    """The pair in a row.

    Args:
        rename: the layout's column → the dataset's.

    Raises:
        DataError: names the column that is wrong.
    """
    pair = layout.read(renamed(row, rename or {}))
    try:
        json.dumps(pair.body(), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError("text that is not Unicode: half of a surrogate pair") from None
    return pair


def renamed(row: Row, rename: Mapping[str, str]) -> Row:
    """The row with the layout's names for its columns."""
    return {**row, **{ours: row[theirs] for ours, theirs in rename.items() if theirs in row}}


def recognise(rows: Sequence[Row], rename: Mapping[str, str]) -> Layout:
    """The first layout that fits most of the rows.

    Raises:
        DataError: none does; says what columns there are and what is known.
    """
    counts = [sum(layout.fits(renamed(row, rename)) for row in rows) for layout in LAYOUTS.values()]
    if not rows or 2 * max(counts) < len(rows) or not max(counts):
        found = ", ".join(sorted({column for row in rows for column in row})) or "none"
        known = "\n".join(f"  {layout.name:9} {layout.says}" for layout in LAYOUTS.values())
        raise DataError(
            f"no layout of preference pairs recognised; the columns are: {found}. Known are\n{known}\n"
            "Name one with --layout, or say which columns to take: --columns prompt=question,chosen=answer_a,rejected=answer_b"
        )
    return list(LAYOUTS.values())[counts.index(max(counts))]


def transcript(text: str) -> Messages:
    """``Human: … Assistant: …`` as messages, without an empty last one.

    Raises:
        DataError: text that does not begin with a speaker.
    """
    parts = TURN.split(text)
    if parts[0].strip() or len(parts) < 3:
        raise DataError("a transcript must begin with 'Human:' or 'Assistant:'")
    turns = [
        {"role": SPEAKERS[who], "content": said.strip()} for who, said in zip(parts[1::2], parts[2::2], strict=True)
    ]
    return turns[:-1] if not turns[-1]["content"] else turns


def _trl(row: Row) -> Pair:
    return Pair(_prompt(row, "prompt"), _answer(row, "chosen"), _answer(row, "rejected"))


def _chat(row: Row) -> Pair:
    return _together(_messages(row, "chosen"), _messages(row, "rejected"))


def _hh(row: Row) -> Pair:
    if row.get("prompt") is not None:
        return Pair(transcript(_text(row, "prompt")), _text(row, "chosen"), _text(row, "rejected"))
    return _together(transcript(_text(row, "chosen")), transcript(_text(row, "rejected")))


def _pku(row: Row) -> Pair:
    column = "safer_response_id" if row.get("safer_response_id") is not None else "better_response_id"
    better = _get(row, column)
    if str(better) not in ("0", "1"):
        raise DataError(f"{column!r} must be 0 or 1")
    return Pair(_text(row, "prompt"), _text(row, f"response_{int(better)}"), _text(row, f"response_{1 - int(better)}"))


def _sharegpt(row: Row) -> Pair:
    turns = _get(row, "conversations")
    if not isinstance(turns, list) or not turns:
        raise DataError("'conversations' must be a list of {from, value} turns")
    prompt = [_turn(turn, "conversations") for turn in turns]
    return Pair(
        prompt, _turn(_get(row, "chosen"), "chosen")["content"], _turn(_get(row, "rejected"), "rejected")["content"]
    )


def _together(chosen: Messages, rejected: Messages) -> Pair:
    """Two whole conversations that part at their last turn."""
    for name, conversation in (("chosen", chosen), ("rejected", rejected)):
        if not conversation or conversation[-1]["role"] != "assistant":
            raise DataError(f"{name!r} must end with the assistant's turn: it is what is compared")
        if len(conversation) == 1:
            raise DataError(f"{name!r} has nothing before the assistant's turn, and there is no 'prompt'")
    if chosen[:-1] != rejected[:-1]:
        raise DataError("'chosen' and 'rejected' answer different prompts: they must be the same up to the last turn")
    return Pair(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])


def _get(row: Row, column: str) -> Any:
    if row.get(column) is None:
        raise DataError(f"{column!r} is missing; the row has {', '.join(sorted(map(str, row))) or 'no columns'}")
    return row[column]


def _text(row: Row, column: str) -> str:
    value = _get(row, column)
    if not isinstance(value, str):
        raise DataError(f"{column!r} must be text")
    return value


def _prompt(row: Row, column: str) -> Prompt:
    return _text(row, column) if not isinstance(row.get(column), list) else _messages(row, column)


def _answer(row: Row, column: str) -> str:
    """Text, or messages of which the last is the answer (some datasets repeat the prompt before it)."""
    if isinstance(row.get(column), list):
        messages = _messages(row, column)
        if messages[-1]["role"] != "assistant":
            raise DataError(f"{column!r} must end with the assistant's message")
        return messages[-1]["content"]
    return _text(row, column)


def _messages(row: Row, column: str) -> Messages:
    value = _get(row, column)
    if not _is_messages(value):
        raise DataError(f"{column!r} must be a list of {{role, content}} messages")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _turn(turn: Any, column: str) -> dict[str, str]:
    if not (isinstance(turn, dict) and turn.get("from") in SHAREGPT and isinstance(turn.get("value"), str)):
        raise DataError(f"{column!r} must have turns such as {{'from': 'human', 'value': '…'}}")
    return {"role": SHAREGPT[turn["from"]], "content": turn["value"]}


def _is_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
        )
    )


def _is_transcript(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("Human:") and "\n\nAssistant:" in value


def _has_pair(row: Row) -> bool:
    return row.get("chosen") is not None and row.get("rejected") is not None


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(
            "hh",
            "chosen and rejected as 'Human: … Assistant: …' transcripts, or such a prompt and two answers",
            frozenset({"prompt", "chosen", "rejected"}),
            lambda row: _has_pair(row) and _is_transcript(row.get("prompt") or row["chosen"]),
            _hh,
        ),
        Layout(
            "sharegpt",
            "conversations of {from, value} turns, and chosen and rejected as one turn each",
            frozenset({"conversations", "chosen", "rejected"}),
            lambda row: _has_pair(row) and isinstance(row.get("conversations"), list),
            _sharegpt,
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
            _trl,
        ),
        Layout(
            "chat",
            "chosen and rejected as whole conversations that part at the last turn",
            frozenset({"chosen", "rejected"}),
            lambda row: _is_messages(row.get("chosen")) and _is_messages(row.get("rejected")),
            _chat,
        ),
    )
}
