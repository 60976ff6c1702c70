"""Single labelled responses, as XSTest and response-classification sets publish them.

    XSTest   prompt, response, type, label   1 compliance, 2 refusal, 3 partial refusal; types that begin with
                                             "contrast" are harmful
    others   prompt, response, safe          true or false

In XSTest's form an answer to a harmful prompt is unsafe and everything else is safe. Partial refusals are left out:
neither side's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from inward.offline.data import data_errors, told
from inward_client import rows
from inward_client.rows import Prompt

Behaviour = Literal["comply", "refuse"]
LABELS: Mapping[str, Behaviour | None] = {"1": "comply", "2": "refuse", "3": None}
LABEL = re.compile(r"([123])(?:\.0)?(?:_|$)")
"""A number, or a name that begins with it."""


@dataclass(frozen=True, slots=True)
class LabelledResponse:
    """One response; ``behaviour`` and ``harmful`` (the prompt) are known in XSTest's form only."""

    prompt: Prompt
    text: str
    safe: bool
    behaviour: Behaviour | None = None
    harmful: bool | None = None
    part: str | None = None
    """What stands in the column that divides the report."""


def read_responses(path: Path, *, by: str | None = None) -> tuple[list[LabelledResponse], int]:
    """Reads a file or folder of rows. Rows that can't be read are left out, which standard error says.

    Returns:
        The responses, and how many partial refusals were left out.

    Raises:
        DataError: there is none that can be read; names file, line and column.
    """
    with data_errors():
        read = told(rows.collect(Path(path), lambda row: _in_part(row, by))).values
    kept = [one for one in read if one is not None]
    return kept, len(read) - len(kept)


def part_of(row: rows.Row, by: str) -> str | None:
    """What stands in the column that divides the report; None of an empty cell."""
    value = row.get(by)
    return None if value in (None, "") else str(value)


def _in_part(row: rows.Row, by: str | None) -> LabelledResponse | None:
    one = _response(row)
    if one is None or by is None:
        return one
    return replace(one, part=part_of(row, by))


def _response(row: rows.Row) -> LabelledResponse | None:
    prompt, text = rows.read_item(rows.read_prompt(row), rows.get(row, "response"))
    if row.get("label") is None:
        safe = rows.which(row.get("safe"))
        if safe is None:
            raise rows.DataError(
                "needs 'safe' (true or false), or 'type' and 'label' as XSTest has them", column="safe"
            )
        return LabelledResponse(prompt, text, bool(safe))
    if (label := LABEL.match(str(row["label"]))) is None:
        raise rows.DataError("'label' must be 1 (compliance), 2 (refusal) or 3 (partial)", column="label")
    kind = rows.get(row, "type")
    if not isinstance(kind, str):
        raise rows.DataError("'type' must be text", column="type")
    behaviour, harmful = LABELS[label[1]], kind.startswith("contrast")
    return behaviour and LabelledResponse(prompt, text, not (harmful and behaviour == "comply"), behaviour, harmful)
