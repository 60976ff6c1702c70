"""Control tokens that somebody spells out in a text stay text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from inward.types import Prompt


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]: ...
    def __call__(self, text: list[str], *, add_special_tokens: bool, split_special_tokens: bool) -> Any: ...
    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> Any: ...


@dataclass(frozen=True, slots=True)
class ControlTokens:
    """The tokenizer's control tokens as texts spell them, and where each is cut so that it stays text."""

    pattern: re.Pattern[str] | None
    cuts: Mapping[str, int]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ControlTokens:
        spelled = sorted(
            (token.content for token in tokenizer.added_tokens_decoder.values() if token.special),
            key=lambda s: (-len(s), s),
        )
        spelled = [token for token in spelled if len(token) > 1]
        if not spelled:
            return cls(None, {})
        as_text = tokenizer(spelled, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        first = [str(tokenizer.decode(ids[:1], skip_special_tokens=False)) for ids in as_text]
        cuts = {
            token: len(begun) if begun and token.startswith(begun) and begun != token else 1
            for token, begun in zip(spelled, first, strict=True)
        }  # after the first token that it has as text, so that all of its tokens are those of text
        return cls(re.compile("|".join(map(re.escape, spelled))), cuts)

    def broken(self, prompt: Prompt, responses: list[str]) -> tuple[Prompt, list[str], str]:
        """Both with a character in each control token that is spelled out, and that character; none if none is."""
        texts = [prompt] if isinstance(prompt, str) else [str(message.get("content")) for message in prompt]
        texts += responses
        if self.pattern is None or not any(map(self.pattern.search, texts)):
            return prompt, responses, ""
        mark = next(c for c in map(chr, range(0x10FFFF, 0, -1)) if not any(c in text for text in texts))

        def cut(text: Any) -> Any:
            assert self.pattern is not None
            return self.pattern.sub(lambda m: m[0][: self.cuts[m[0]]] + mark + m[0][self.cuts[m[0]] :], text)

        if isinstance(prompt, str):
            return cut(prompt), [cut(response) for response in responses], mark
        messages = [
            {**message, "content": cut(message["content"])} if isinstance(message.get("content"), str) else message
            for message in prompt
        ]
        return messages, [cut(response) for response in responses], mark
