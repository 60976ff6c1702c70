"""What is trained on: a prompt, two answers, and what the service said of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from inward_trainer.errors import DataError

Messages = list[dict[str, str]]
Prompt = str | Messages


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


def read_row(row: Mapping[str, Any], id: str) -> ScoredPair:
    """A pair from a row as people and the service write it: ``prompt`` or ``messages``, ``chosen``, ``rejected``, each
    a text or chat messages, and whatever scores and finish reasons are there.

    Raises:
        DataError: a field is missing or of a wrong form.
    """
    prompt = row.get("prompt", row.get("messages"))
    if not isinstance(prompt, str) and not _is_chat(prompt):
        raise DataError(f"row {id}: `prompt` must be a text or a list of messages with role and content")
    assert prompt is not None
    return ScoredPair(
        id=id,
        prompt=prompt if isinstance(prompt, str) else [{"role": m["role"], "content": m["content"]} for m in prompt],
        chosen=_answer(row, "chosen", id),
        rejected=_answer(row, "rejected", id),
        confidence=_number(row, "confidence", id, 0.0, 1.0),
        chosen_score=_number(row, "chosen_score", id),
        rejected_score=_number(row, "rejected_score", id),
        finished=(row.get("chosen_finish_reason") != "length", row.get("rejected_finish_reason") != "length"),
        policy_version=row.get("policy_version"),
    )


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(
            isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in value
        )
    )


def _answer(row: Mapping[str, Any], field: str, id: str) -> str:
    value = row.get(field)
    if isinstance(value, str):
        return value
    if _is_chat(value) and value is not None and len(value) == 1 and value[0]["role"] == "assistant":
        return str(value[0]["content"])
    raise DataError(f"row {id}: `{field}` must be a text or a list of one assistant message")


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
