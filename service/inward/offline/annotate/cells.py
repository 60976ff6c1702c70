"""Values as the output's format can hold them, and text as a terminal can show it."""

from __future__ import annotations

import base64
import json
import math
import unicodedata
from collections.abc import Mapping
from typing import Any

DIRECTIONS = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})
"""Classes of characters that change the order in which others are shown."""
MARKS = frozenset("\u200e\u200f\u061c")
"""Others that do."""


def plain(value: Any) -> Any:
    """A value as strict JSON has it: NaN and Infinity are null, bytes are base64, whatever JSON lacks is its text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes | bytearray | memoryview):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, Mapping):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def to_json(value: Any) -> str:
    """One line of strict JSON that UTF-8 can hold."""
    value = plain(value)
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return json.dumps(value, allow_nan=False)
    return text


def to_csv(value: Any) -> Any:
    """A cell of a CSV file; what is nested is JSON."""
    value = plain(value)
    return to_json(value) if isinstance(value, dict | list) else value


def printable(text: str) -> str:
    """Text for a terminal: control characters and marks of direction are written as escapes."""
    return "".join(_escaped(c) if _is_hidden(c) else c for c in text)


def _is_hidden(c: str) -> bool:
    if c in "\n\t":
        return False
    if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp"):
        return True
    return c in MARKS or unicodedata.bidirectional(c) in DIRECTIONS


def _escaped(c: str) -> str:
    return c.encode("unicode_escape" if not 0xD800 <= ord(c) <= 0xDFFF else "ascii", "backslashreplace").decode("ascii")
