"""What is trained on: a prompt, two answers, and what the service said of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from inward_client.rows import LAYOUTS, PairReader, read_pair
from inward_client.rows import DataError as RowError
from inward_client.rows import Prompt as Prompt
from inward_trainer.errors import DataError


@dataclass(frozen=True, slots=True)
class ScoredPair:
    """One preference pair. ``id`` is unique within its source (a row's number, a stream's entry, a prompt's place).

    ``finished`` says of chosen and rejected whether they ended by themselves; one that was cut at its length limit is
    not followed by an end-of-sequence token in training. Scores and ``confidence`` are the hybrid head's, ``monitor``
    the monitor head's of both answers. ``chosen_ids`` and ``rejected_ids`` are the tokens that the policy wrote, where
    it did, without what ended them: its text may become other tokens again.
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


def read_row(row: Mapping[str, Any], id: str, *, as_scored: bool = False) -> ScoredPair:
    """A pair from a row as people and the service write it, in any layout, with whatever scores and finish reasons are
    there.

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
    return ScoredPair(
        id=id,
        prompt=pair.prompt,
        chosen=pair.chosen,
        rejected=pair.rejected,
        confidence=_number(row, "confidence", id, 0.0, 1.0),
        chosen_score=_number(row, "chosen_score", id),
        rejected_score=_number(row, "rejected_score", id),
        finished=(row.get("chosen_finish_reason") != "length", row.get("rejected_finish_reason") != "length"),
        policy_version=row.get("policy_version"),
    )


def _number(
    row: Mapping[str, Any], field: str, id: str, least: float = -math.inf, most: float = math.inf
) -> float | None:
    value = row.get(field)
    if value is None:
        return None
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or not least <= value <= most
    ):
        raise DataError(f"row {id}: `{field}` is {value!r}, not a number between {least} and {most}")
    return float(value)
