"""Drawn tokens as text: the whole of it, and, while they are drawn, as much as no further token changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from inward.types import Ids

STRAY = "<0xFF>"
"""Name of the token, in vocabularies with tokens for single bytes, of a byte that is in no text. One of them turns all
bytes beside it into replacement characters, also those that were whole characters until then."""
UNKNOWN = "\ufffd"
"""What stands for bytes that are no character, or not yet."""


class Decoder:
    """``tokenizer`` for drawn tokens, whose special ones are no text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        stray = tokenizer.get_vocab().get(STRAY)
        self._stray: Ids = () if stray is None else (stray,)
        tidies = getattr(tokenizer, "tidies", getattr(tokenizer, "clean_up_tokenization_spaces", False))
        self._tidies = bool(tidies)

    def text(self, ids: Ids) -> str:
        """All of it."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def certain(self, ids: Ids) -> str:
        """The text of the first tokens of a response as far as none that follows changes it: without half a character,
        and without the last word where spaces are tidied.
        """
        text = self.text(ids)
        if self._stray:
            text = _common(text, self.text(ids + self._stray))
        if self._tidies:
            text = text[: max(text.rfind(" "), text.rfind("\n"), 0)]
        return text.rstrip(UNKNOWN)


def _common(a: str, b: str) -> str:
    """What both begin with."""
    return a[: next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))]


def before_stop(text: str, stops: Sequence[str]) -> str:
    """``text``, which goes on, without what is, or may become, a stop string at its end."""
    ends = [at for stop in stops if (at := text.find(stop)) >= 0]
    for stop in stops:
        begun = next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
        ends.append(len(text) - begun)
    return text[: min(ends, default=len(text))]
