"""Single labelled responses, as XSTest and response-classification sets publish them.

    XSTest   prompt, response, type, label   1 compliance, 2 refusal, 3 partial refusal; types that begin with
    "contrast" are harmful others   prompt, response, safe          true or false

In XSTest's form an answer to a harmful prompt is unsafe and everything else is safe. Partial refusals are left out:
neither side's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from inward.errors import DataError

Behaviour = Literal["comply", "refuse"]
LABELS: Mapping[str, Behaviour | None] = {"1": "comply", "2": "refuse", "3": None}


@dataclass(frozen=True, slots=True)
class LabelledResponse:
    """One response; ``behaviour`` and ``harmful`` (the prompt) are known in XSTest's form only."""

    prompt: str
    text: str
    safe: bool
    behaviour: Behaviour | None = None
    harmful: bool | None = None


def read_responses(path: Path) -> tuple[list[LabelledResponse], int]:
    """Reads JSONL or Parquet.

    Returns:
        The responses, and how many partial refusals were left out.

    Raises:
        DataError: names file, line and field.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} does not exist or is not a file")
    read = [
        _response(where, fields) for where, fields in (_parquet(path) if path.suffix == ".parquet" else _jsonl(path))
    ]
    if not read:
        raise DataError(f"{path} has no rows")
    kept = [one for one in read if one is not None]
    return kept, len(read) - len(kept)


def _response(where: str, fields: Mapping[str, Any]) -> LabelledResponse | None:
    prompt, text = _text(where, fields, "prompt"), _text(where, fields, "response")
    if "label" not in fields:
        safe = fields.get("safe")
        if not (isinstance(safe, bool) or safe in (0, 1)):
            raise DataError(
                f"{where}: needs 'safe' (true or false), or 'type' and 'label' as XSTest has them", param="safe"
            )
        return LabelledResponse(prompt, text, bool(safe))
    label = str(fields["label"])[:1]
    if label not in LABELS:
        raise DataError(
            f"{where}: 'label' must be 1 (compliance), 2 (refusal) or 3 (partial); it is {fields['label']!r}",
            param="label",
        )
    behaviour, harmful = LABELS[label], _text(where, fields, "type").startswith("contrast")
    return behaviour and LabelledResponse(prompt, text, not (harmful and behaviour == "comply"), behaviour, harmful)


def _text(where: str, fields: Mapping[str, Any], name: str) -> str:
    if not isinstance(fields.get(name), str):
        raise DataError(f"{where}: {name!r} must be a string", param=name)
    return str(fields[name])


def _jsonl(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except ValueError as error:
                raise DataError(f"{where}: not JSON ({error})") from None
            if not isinstance(fields, dict):
                raise DataError(f"{where}: must be a JSON object")
            yield where, fields


def _parquet(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file ({error})") from error
    for number, fields in enumerate(rows, start=1):
        yield f"{path}, row {number}", fields
