"""Values as the output's format can hold them."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from typing import Any


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
