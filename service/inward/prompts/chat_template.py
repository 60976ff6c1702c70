"""The model's chat template: conversations → text, and the turns that it would leave out of it without a word."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, Protocol

from inward.errors import SetupError

DATE = datetime(2024, 7, 26)
"""Today, for chat templates that print it: a text has the same ids tomorrow. It is the day to which Llama 3's own
template falls back."""
MARKER = "mzx{}z"
"""Content of turn number {}: nothing that a template trims, splits or escapes."""
SHAPES_REMEMBERED = 1024


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    chat_template: Any

    def apply_chat_template(
        self, conversation: list[Any], *, tokenize: bool, add_generation_prompt: bool, **variables: Any
    ) -> Any: ...


class ChatTemplate:
    """Applies a tokenizer's chat template.

    Templates of models that see images write the texts of content parts only, and nothing at all of a content that is a
    text: those get parts.

    Raises:
        SetupError: what a user says is written in neither form.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        source = str(tokenizer.chat_template)
        self.prints_date = "strftime_now" in source
        self._variables: dict[str, Callable[[str], str]] = {"strftime_now": DATE.strftime} if self.prints_date else {}
        self.name = f"chat:{hashlib.sha256(source.encode()).hexdigest()[:16]}"
        """Names it in a head's manifest, with the date where it prints one."""
        if self.prints_date:
            self.name += f"@{DATE:%Y-%m-%d}"
        self._parts = False
        self._left_out = lru_cache(SHAPES_REMEMBERED)(self._probe)
        if self._left_out(("user",)):
            self._parts = True
            self._left_out.cache_clear()
            if self._left_out(("user",)):
                raise SetupError(
                    "the model's chat template writes nothing of what a user says: give a format string with "
                    "--template, such as '{prompt}\\n\\n{response}'"
                )

    def __call__(self, messages: Sequence[Mapping[str, str]], *, answer_next: bool) -> str:
        """The text of a conversation, up to where the answer begins if it is ``answer_next``.

        Raises:
            Exception: whatever a template refuses with.
        """
        turns: list[Any] = [dict(message) for message in messages]
        if self._parts:
            turns = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        return str(
            self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=answer_next, **self._variables
            )
        )

    def left_out(self, messages: Sequence[Mapping[str, str]]) -> int | None:
        """The first turn that the template leaves out because of its role or its place, if there is one. Some know no
        developer, no tool, or a system turn at the beginning only.
        """
        found = self._left_out(tuple(message["role"] for message in messages))
        return found[0] if found else None

    def _probe(self, roles: tuple[str, ...]) -> tuple[int, ...]:
        markers = [MARKER.format(i) for i in range(len(roles))]
        turns = [{"role": role, "content": marker} for role, marker in zip(roles, markers, strict=True)]
        try:
            text = self(turns, answer_next=True)
        except Exception:  # a refusal is no silence
            return ()
        return tuple(i for i, marker in enumerate(markers) if marker not in text)
