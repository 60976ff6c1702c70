"""What is trained on: a prompt, two answers, and what the service said of them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from inward_client.rows import LAYOUTS, PairReader, read_pair
from inward_client.rows import DataError as RowError
from inward_client.rows import Prompt as Prompt
from inward_trainer.errors import DataError


@dataclass(frozen=True, slots=True)
class ScoredPair:
    """One preference pair. ``id`` is unique within its source (a row's number, a stream's entry, a prompt's place).

    ``finished`` says of chosen and rejected whether they ended by themselves; one that was cut, at its length limit or
    by the service, is not followed by an end-of-sequence token in training. Scores and ``confidence`` are the hybrid
    head's, ``monitor`` the monitor head's of both answers. ``chosen_ids`` and ``rejected_ids`` are the tokens that the
    policy wrote, where it did, without what ended them: its text may become other tokens again.
    """

    id: str
    prompt: Prompt
    chosen: str
    rejected: str
    confidence: float | None = None
    chosen_score: float | None = None
    rejected_score: float | None = None
    monitor: tuple[float, float] | None = None
    finished: tuple[bool, bool] = (True, True)
    policy_version: str | None = None
    chosen_ids: tuple[int, ...] | None = None
    rejected_ids: tuple[int, ...] | None = None

    def texts(self) -> dict[str, Any]:
        """As the service's routes take a pair."""
        return {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}

    def to_json(self) -> dict[str, Any]:
        """For ``from_json``."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ScoredPair:
        """What ``to_json`` gave, perhaps through a file."""
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list) and name != "prompt"}
        return cls(**{**values, **lists})


def digest(pairs: Iterable[ScoredPair]) -> str:
    """Of their texts, in their order: what was asked of a service belongs to these and no others."""
    found = hashlib.sha256()
    for pair in pairs:
        found.update(json.dumps(pair.texts()).encode() + b"\n")
    return found.hexdigest()


def read_row(row: Mapping[str, Any], id: str, *, as_scored: bool = False) -> ScoredPair:
    """A pair from a row as people and the service write it, in any layout, with whatever scores and finish reasons are
    there. Scores of a row whose ``head`` is of another kind than hybrid are left out: they have another scale.

    Args:
        as_scored: the row comes from the service, whose prompts are what they are, whatever they look like.

    Raises:
        DataError: a column is missing or of a wrong form.
    """
    layout = LAYOUTS["trl" if row.get("prompt") is not None else "messages"] if as_scored else None
    try:
        pair = PairReader(layout).pair(row) if layout else read_pair(row)
    except RowError as error:
        raise DataError(f"row {id}: {error.reason}") from None
    head = row.get("head")
    hybrid = not isinstance(head, Mapping) or head.get("kind", "hybrid") == "hybrid"
    return ScoredPair(
        id=id,
        prompt=pair.prompt,
        chosen=pair.chosen,
        rejected=pair.rejected,
        confidence=number(row, "confidence", id, 0.0, 1.0),
        chosen_score=number(row, "chosen_score", id) if hybrid else None,
        rejected_score=number(row, "rejected_score", id) if hybrid else None,
        finished=(_finished(row, "chosen"), _finished(row, "rejected")),
        policy_version=row.get("policy_version"),
    )


def number(
    row: Mapping[str, Any], field: str, id: str, least: float = -math.inf, most: float = math.inf
) -> float | None:
    """What a row has in a field, perhaps as text, as CSV has it; None where it has nothing.

    Raises:
        DataError: it is no number, or out of bounds.
    """
    value = row.get(field)
    if value is None or value == "":
        return None
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found) or not least <= found <= most:
        bounds = f" between {least} and {most}" if math.isfinite(most) else ""
        raise DataError(f"row {id}: `{field}` is {value!r}, not a number{bounds}")
    return found


def _finished(row: Mapping[str, Any], answer: str) -> bool:
    return (row.get(f"{answer}_finish_reason") or "stop") == "stop"
