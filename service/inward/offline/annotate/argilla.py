"""Annotated pairs as records that Argilla reads (``dataset.records.from_json``), for deciding with several people.

The dataset there has the fields ``prompt``, ``chosen`` and ``rejected``, a label question ``label`` with the answers
``right``, ``flip`` and ``drop``, and metadata ``margin``, ``label_probability``, ``source`` and ``row``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from inward.offline.annotate.cells import to_json
from inward.offline.annotate.decisions import key_of
from inward.offline.annotate.scorer import Annotated
from inward_client.rows import PairReader, Row, as_turns

Numbered = Iterator[tuple[int, Row, Annotated]]


def write(path: Path, tables: Iterable[tuple[str, Numbered]], reader: PairReader, head: str) -> None:
    """Writes a record for each annotated row.

    Args:
        tables: of each its name, and its rows with their numbers, from 1.
        head: that suggests the answers.
    """
    with path.open("w", encoding="utf-8") as file:
        file.write("[")
        between = "\n"
        for name, rows in tables:
            for number, row, annotated in rows:
                file.write(between + to_json(record(name, number, row, annotated, reader, head)))
                between = ",\n"
        file.write("\n]\n")


def record(source: str, number: int, row: Row, annotated: Annotated, reader: PairReader, head: str) -> dict[str, Any]:
    """Of one row; a pair without a verdict has no suggestion."""
    assert annotated.columns is not None
    pair, columns = reader.pair(row), annotated.columns
    turns = as_turns(pair.prompt)
    prompt = turns[0]["content"] if len(turns) == 1 else "\n\n".join(f"[{m['role']}] {m['content']}" for m in turns)
    key, agrees, probability = key_of(pair), columns["label_agrees"], columns.get("label_probability")
    suggestion: dict[str, Any] = {"value": "right" if agrees else "flip", "agent": head}
    if probability is not None:
        suggestion["score"] = probability if agrees else 1 - probability
    told = {"margin": columns["margin"], "label_probability": probability, "source": source, "row": number, "key": key}
    return {
        # rows that repeat a pair are records of their own
        "id": hashlib.sha256(f"{source}:{number}:{key}".encode()).hexdigest()[:32],
        "fields": {"prompt": prompt, "chosen": pair.chosen, "rejected": pair.rejected},
        "metadata": {name: value for name, value in told.items() if value is not None},
        "suggestions": {} if agrees is None else {"label": suggestion},
    }
