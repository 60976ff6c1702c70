"""Rows that heads are fitted on: preference pairs, response lists and LEGEND's calibration rows, from JSONL or Parquet.

Extra columns are ignored. An error names the file, the line (of a Parquet file: the row) and the field.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from inward.errors import DataError
from inward.offline.states.saved import (
    Indices,
    ListStates,
    PairStates,
    load_list_states,
    load_pair_states,
    load_states,
    save_states,
)
from inward.prompts import Prompt

__all__ = [
    "CalibrationRow",
    "Indices",
    "ListStates",
    "Pair",
    "PairStates",
    "Response",
    "ResponseList",
    "data_hash",
    "grouped_folds",
    "grouped_split",
    "has_refusals",
    "load_list_states",
    "load_pair_states",
    "load_states",
    "prompt_groups",
    "read_calibration",
    "read_lists",
    "read_pairs",
    "read_texts",
    "save_states",
    "whole_prompts",
]


@dataclass(frozen=True, slots=True)
class Pair:
    """A preference: ``chosen`` is the better (safer) response to ``prompt``."""

    prompt: Prompt
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True)
class Response:
    """One response of a list and whether it is acceptable."""

    text: str
    safe: bool


@dataclass(frozen=True, slots=True)
class ResponseList:
    """A prompt with labelled responses, for a listwise ranker."""

    prompt: Prompt
    responses: tuple[Response, ...]


@dataclass(frozen=True, slots=True)
class CalibrationRow:
    """LEGEND's calibration: a harmful prompt, a harmful answer to it, and a refusal."""

    prompt: Prompt
    harmful: str
    refusal: str

    @property
    def pair(self) -> Pair:
        """The same as a preference."""
        return Pair(self.prompt, chosen=self.refusal, rejected=self.harmful)


def read_pairs(path: Path) -> list[Pair]:
    """Rows with ``prompt``, ``chosen``, ``rejected``; the answers are strings, or (as TRL writes them) one assistant
    message in a list.

    Raises:
        DataError: names file, line and field.
    """
    return [Pair(row.prompt(), row.answer("chosen"), row.answer("rejected")) for row in _rows(path)]


def read_lists(path: Path) -> list[ResponseList]:
    """Rows with ``prompt`` and ``responses: [{"text", "safe"}, …]``.

    Raises:
        DataError: names file, line and field.
    """
    return [ResponseList(row.prompt(), row.responses()) for row in _rows(path)]


def read_calibration(path: Path) -> list[CalibrationRow]:
    """Rows with ``prompt``, ``harmful``, ``refusal``.

    Raises:
        DataError: names file, line and field.
    """
    return [CalibrationRow(row.prompt(), row.answer("harmful"), row.answer("refusal")) for row in _rows(path)]


def read_texts(path: Path) -> list[tuple[Prompt, tuple[str, ...]]]:
    """Prompts with their responses, whatever the file calls them, and whatever it says of them.

    Rows have ``response``, ``responses``, ``chosen`` and ``rejected``, or ``harmful`` and ``refusal``.

    Raises:
        DataError: names file, line and field.
    """
    return [(row.prompt(), row.texts()) for row in _rows(path)]


def has_refusals(path: Path) -> bool:
    """Whether the rows of a file are calibration rows (``harmful`` and ``refusal``) and not labelled pairs; the first
    row decides.

    Raises:
        DataError: the file can't be read.
    """
    return next(_rows(path)).fields.keys() >= {"harmful", "refusal"}


def data_hash(rows: Iterable[Pair | ResponseList | CalibrationRow]) -> str:
    """SHA-256 of the rows' content, in order: the same from JSONL and Parquet, whatever their other columns."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(asdict(row), sort_keys=True).encode() + b"\n")
    return f"sha256:{digest.hexdigest()[:32]}"


def prompt_groups(prompts: Iterable[Prompt]) -> Indices:
    """``[N]``: a number for each prompt, made of its text, so that a split does not depend on the order of the rows."""
    keys = (hashlib.sha256(json.dumps(_plain(p), sort_keys=True).encode()).digest() for p in prompts)
    return np.array([int.from_bytes(key[:8], "big") >> 1 for key in keys], dtype=np.int64)


def grouped_split(groups: ArrayLike, fractions: Sequence[float], seed: int) -> list[Indices]:
    """Splits rows into parts of about the given sizes; rows of one group stay together, and no part is empty.

    Which part a group goes to depends on seed, groups and their sizes, not on the order of the rows.

    Args:
        groups: ``[N]``, one label a row (see ``prompt_groups``).
        fractions: sizes of the parts, relative to their sum.

    Returns:
        Row numbers of each part, ascending.

    Raises:
        DataError: fewer groups than parts.
    """
    groups_N = np.asarray(groups)
    labels, inverse, counts = np.unique(groups_N, return_inverse=True, return_counts=True)
    if len(labels) < len(fractions):
        raise DataError(
            f"{len(labels)} different prompts can't be split into {len(fractions)} parts: more data is needed"
        )
    shuffled = sorted(range(len(labels)), key=lambda i: hashlib.sha256(f"{seed}:{labels[i]}".encode()).digest())
    wanted, filled = np.asarray(fractions, dtype=np.float64), np.zeros(len(fractions))
    part_of = np.empty(len(labels), dtype=np.int64)
    for i in shuffled:
        part_of[i] = part = int(np.argmin(filled / wanted))  # the emptiest, in proportion
        filled[part] += counts[i]
    return [np.flatnonzero(part_of[inverse] == part) for part in range(len(fractions))]


def grouped_folds(groups: ArrayLike, k: int, seed: int) -> list[tuple[Indices, Indices]]:
    """``k`` times (train, held out) of a cross-validation in which rows of one group are always on the same side.

    Raises:
        DataError: fewer groups than folds.
    """
    parts = grouped_split(groups, [1.0] * k, seed)
    return [(np.sort(np.concatenate([p for p in parts if p is not held_out])), held_out) for held_out in parts]


def whole_prompts(groups_N: Indices, most: int) -> Indices:
    """About ``most`` rows: all those of some prompts, which a hash of the prompt chooses, not the order of the rows."""
    if len(groups_N) <= most:
        return np.arange(len(groups_N), dtype=np.int64)
    parts = max(2, -(-len(groups_N) // most))
    return grouped_split(groups_N, [1.0, parts - 1.0], 0)[0]


@dataclass(frozen=True, slots=True)
class _Row:
    """One row as it was read, and where, for the message."""

    where: str
    fields: Mapping[str, Any]

    def prompt(self) -> Prompt:
        value = self._get("prompt")
        if isinstance(value, str):
            return value
        if isinstance(value, list) and value and all(_is_message(m) for m in value):
            return [{"role": m["role"], "content": m["content"]} for m in value]
        raise self._error("prompt", "must be a string or a list of {role, content} messages")

    def answer(self, field: str) -> str:
        value = self._get(field)
        if isinstance(value, list) and len(value) == 1 and _is_message(value[0]):
            value = value[0]["content"]
        if not isinstance(value, str):
            raise self._error(field, "must be a string, or a list of one {role, content} message")
        return value

    def texts(self) -> tuple[str, ...]:
        for names in (("chosen", "rejected"), ("refusal", "harmful")):
            if self.fields.keys() >= set(names):
                return tuple(self.answer(name) for name in names)
        if "responses" not in self.fields:
            return (self.answer("response"),)
        value = self._get("responses")
        if not isinstance(value, list) or not value:
            raise self._error("responses", "must be a list that is not empty")
        found = [one.get("text") if isinstance(one, dict) else one for one in value]
        texts = tuple(text for text in found if isinstance(text, str))
        if len(texts) < len(found):
            raise self._error("responses", 'must hold strings, or {"text"} with a string')
        return texts

    def responses(self) -> tuple[Response, ...]:
        value = self._get("responses")
        if not isinstance(value, list) or not value:
            raise self._error("responses", 'must be a list of {"text", "safe"} that is not empty')
        for i, response in enumerate(value):
            if not isinstance(response, dict) or not isinstance(response.get("text"), str):
                raise self._error(f"responses.{i}.text", "must be a string")
            if not (isinstance(response.get("safe"), bool) or response.get("safe") in (0, 1)):
                raise self._error(f"responses.{i}.safe", "must be true or false")
        return tuple(Response(r["text"], bool(r["safe"])) for r in value)

    def _get(self, field: str) -> Any:
        if self.fields.get(field) is None:
            raise self._error(field, f"is missing; the row has {', '.join(sorted(self.fields)) or 'no fields'}")
        return self.fields[field]

    def _error(self, field: str, problem: str) -> DataError:
        return DataError(f"{self.where}: {field!r} {problem}", param=field)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def _plain(prompt: Prompt) -> Any:
    return prompt if isinstance(prompt, str) else [dict(m) for m in prompt]


def _rows(path: Path) -> Iterator[_Row]:
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} does not exist or is not a file")
    n = 0
    for n, row in enumerate(_parquet(path) if path.suffix == ".parquet" else _jsonl(path), start=1):  # noqa: B007
        yield row
    if n == 0:
        raise DataError(f"{path} has no rows")


def _jsonl(path: Path) -> Iterator[_Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                fields = json.loads(line)
            except ValueError as error:
                raise DataError(f"{where}: not JSON ({error})") from None
            if not isinstance(fields, dict):
                raise DataError(f"{where}: must be a JSON object")
            yield _Row(where, fields)


def _parquet(path: Path) -> Iterator[_Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for fields in batch.to_pylist():
                number += 1
                yield _Row(f"{path}, row {number}", fields)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file ({error})") from error
