"""Rows that heads are fitted on: preference pairs, response lists and LEGEND's calibration rows.

A row that can't be read is left out with its reason, which names the file, the line (of a Parquet file: the row) and
the column.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from inward.errors import DataError
from inward.offline.data import data_errors, told
from inward.types import Indices
from inward.types import Prompt as AnyPrompt
from inward_client import rows
from inward_client.rows import Pair as Pair
from inward_client.rows import Prompt

Folds = Sequence[tuple[Indices, Indices]]
"""(training rows, held-out rows); all rows of a prompt are on one side."""


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


def read_pairs(path: Path, **how: Any) -> list[Pair]:
    """The pairs of a file or folder, in any layout. Rows that can't be read are left out, which standard error says.

    Args:
        how: see ``inward_client.rows.collect_pairs``.

    Raises:
        DataError: there is none that can be read; names file, line and column.
    """
    return collect_pairs(path, **how).values


@data_errors()
def collect_pairs(path: Path, **how: Any) -> rows.Collected[Pair]:
    """``read_pairs`` with the number of each row."""
    return told(rows.collect_pairs(Path(path), **how))


def read_lists(path: Path) -> list[ResponseList]:
    """Rows with a prompt and ``responses: [{"text", "safe"}, …]``; see ``read_pairs``."""
    return collect_lists(path).values


@data_errors()
def collect_lists(path: Path) -> rows.Collected[ResponseList]:
    """``read_lists`` with the number of each row."""

    def read(row: rows.Row) -> ResponseList:
        return ResponseList(rows.read_prompt(row), _responses(rows.get(row, "responses")))

    return told(rows.collect(Path(path), read))


@data_errors()
def read_calibration(path: Path) -> list[CalibrationRow]:
    """Rows with a prompt, ``harmful`` and ``refusal``; see ``read_pairs``."""

    def read(row: rows.Row) -> CalibrationRow:
        refusal, harmful = rows.get(row, "refusal"), rows.get(row, "harmful")
        pair = rows.paired(row, rows.read_prompt(row), refusal, harmful, ("refusal", "harmful"))
        return CalibrationRow(pair.prompt, harmful=pair.rejected, refusal=pair.chosen)

    return told(rows.collect(Path(path), read)).values


@data_errors()
def read_texts(path: Path, *, acceptable: bool = False) -> list[tuple[Prompt, tuple[str, ...]]]:
    """Prompts with their responses, whatever the file calls them.

    Rows have ``response``, ``responses``, ``harmful`` and ``refusal``, or are pairs in any layout; see ``read_pairs``.

    Args:
        acceptable: without those that the file says are not: ``safe`` is false, harmful or rejected ones. Standard
            error says how many.
    """
    if has_refusals(path):
        texts = [(row.prompt, ((row.refusal, True), (row.harmful, False))) for row in read_calibration(path)]
    elif not {"response", "responses"} & _first(path).keys():
        pairs = read_pairs(path, advice="Single answers have the columns prompt and response (or responses)")
        texts = [(pair.prompt, ((pair.chosen, True), (pair.rejected, False))) for pair in pairs]
    else:

        def read(row: rows.Row) -> tuple[Prompt, tuple[tuple[str, bool], ...]]:
            prompt = rows.read_prompt(row)
            if "responses" not in row:
                said = rows.text(rows.get(row, "response"), "'response'", "response")
                return prompt, ((said, row.get("safe") is not False),)
            return prompt, tuple((_said(one, i), _safe(one)) for i, one in enumerate(rows.get(row, "responses")))

        texts = told(rows.collect(Path(path), read)).values
    if left_out := sum(not good for _, said in texts for _, good in said) if acceptable else 0:
        total = sum(len(said) for _, said in texts)
        print(f"note: {left_out} of {total} responses are labelled as not acceptable, and left out", file=sys.stderr)
    kept = [(prompt, tuple(text for text, good in said if good or not acceptable)) for prompt, said in texts]
    return [(prompt, said) for prompt, said in kept if said]


@data_errors()
def read_prompts(path: Path) -> list[Prompt]:
    """What was asked, in rows of any layout, each once."""
    found = told(rows.collect(Path(path), rows.read_prompt)).values
    return list({json.dumps(_plain(prompt)): prompt for prompt in found}.values())


@data_errors()
def has_refusals(path: Path) -> bool:
    """Whether the rows of a file are calibration rows (``harmful`` and ``refusal``) and not labelled pairs; the first
    row that can be read decides.

    Raises:
        DataError: the file can't be read.
    """
    return {"harmful", "refusal"} <= _first(path).keys()


def data_hash(rows: Iterable[Pair | ResponseList | CalibrationRow]) -> str:
    """SHA-256 of the rows' content, in order: the same from JSONL and Parquet, whatever their other columns."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(asdict(row), sort_keys=True).encode() + b"\n")
    return f"sha256:{digest.hexdigest()[:32]}"


def prompt_groups(prompts: Iterable[AnyPrompt]) -> Indices:
    """``[N]``: a number for each prompt, made of its text, so that a split does not depend on the order of the rows."""
    keys = (hashlib.sha256(json.dumps(_plain(p), sort_keys=True).encode()).digest() for p in prompts)
    return np.array([int.from_bytes(key[:8], "big") >> 1 for key in keys], dtype=np.int64)


def check_prompts(groups: ArrayLike, least: int, which: str = "") -> None:
    """That there are so many different prompts.

    Args:
        groups: ``[N]``, see ``prompt_groups``.
        which: prompts are meant, if not all are.

    Raises:
        DataError: there are fewer.
    """
    if (found := len(np.unique(np.asarray(groups)))) < least:
        kind = f"different prompts {which}".rstrip()
        raise DataError(f"{found} {kind}, and {least} at least are needed: give more rows, or a larger --limit")


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
        DataError: fewer groups than folds, or one group only.
    """
    parts = grouped_split(groups, [1.0] * max(k, 2), seed)
    return [(np.sort(np.concatenate([p for p in parts if p is not held_out])), held_out) for held_out in parts]


def whole_prompts(groups_N: Indices, most: int) -> Indices:
    """About ``most`` rows: all those of some prompts, which a hash of the prompt chooses, not the order of the rows."""
    if len(groups_N) <= most:
        return np.arange(len(groups_N), dtype=np.int64)
    parts = max(2, -(-len(groups_N) // most))
    return grouped_split(groups_N, [1.0, parts - 1.0], 0)[0]


def _first(path: Path) -> rows.Row:
    """The first row that can be read; an empty one where none can."""
    every = (row for source in rows.find(Path(path)) for row in source.rows())
    return next((row for row in every if isinstance(row, dict)), {})


def _response(value: Any, i: int) -> Response:
    said = value.get("text") if isinstance(value, dict) else None
    if said is None:
        raise rows.DataError(f"'responses.{i}.text' is missing", column=f"responses.{i}.text")
    safe = rows.which(value.get("safe"))
    if safe is None:
        raise rows.DataError(f"'responses.{i}.safe' must be true or false", column=f"responses.{i}.safe")
    return Response(rows.text(said, f"'responses.{i}.text'", f"responses.{i}.text"), bool(safe))


def _said(value: Any, i: int) -> str:
    """The text of a response, whatever else is known of it."""
    text = value.get("text") if isinstance(value, dict) else value
    return rows.text(text, f"'responses.{i}'", f"responses.{i}")


def _safe(value: Any) -> bool:
    return not isinstance(value, dict) or value.get("safe") is not False


def _responses(value: Any) -> tuple[Response, ...]:
    if not isinstance(value, list) or not value:
        raise rows.DataError('\'responses\' must be a list of {"text", "safe"} that is not empty', column="responses")
    return tuple(_response(response, i) for i, response in enumerate(value))


def _plain(prompt: AnyPrompt) -> Any:
    return prompt if isinstance(prompt, str) else [dict(m) for m in prompt]
