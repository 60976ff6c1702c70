"""Text that may come from anywhere, as a terminal can show it."""

from __future__ import annotations

import unicodedata

DIRECTIONS = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})
"""Classes of characters that change the order in which others are shown."""
MARKS = frozenset("\u200e\u200f\u061c")
"""Others that do."""


def printable(text: str) -> str:
    """The text with control characters and marks of direction as escapes; line breaks and tabs stay."""
    return "".join(_escaped(c) if _is_hidden(c) else c for c in text)


def _is_hidden(c: str) -> bool:
    if c in "\n\t":
        return False
    if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp"):
        return True
    return c in MARKS or unicodedata.bidirectional(c) in DIRECTIONS


def _escaped(c: str) -> str:
    return c.encode("unicode_escape" if not 0xD800 <= ord(c) <= 0xDFFF else "ascii", "backslashreplace").decode("ascii")
