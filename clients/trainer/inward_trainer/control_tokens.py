"""Control tokens that somebody spells out in a text stay text: as the service has it, or what is trained on would not
be what was scored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inward_trainer.pairs import Prompt


@dataclass(frozen=True, slots=True)
class ControlTokens:
    """The tokenizer's control tokens as texts spell them, and where each is cut so that it stays text."""

    pattern: re.Pattern[str] | None
    cuts: Mapping[str, int]

    @classmethod
    def of(cls, tokenizer: Any) -> ControlTokens:
        """Those of a Hugging Face tokenizer."""
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        spelled = sorted((token for token in special if len(token) > 1), key=lambda token: (-len(token), token))
        if not spelled:
            return cls(None, {})
        as_text = tokenizer(spelled, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        first = [str(tokenizer.decode(ids[:1], skip_special_tokens=False)) for ids in as_text]
        cuts = {
            token: len(begun) if begun and token.startswith(begun) and begun != token else 1
            for token, begun in zip(spelled, first, strict=True)
        }  # after the first token that it has as text, so that all of its tokens are those of text
        return cls(re.compile("|".join(map(re.escape, spelled))), cuts)

    def broken(self, prompt: Prompt, answers: Sequence[str]) -> tuple[Prompt, list[str], str]:
        """Both with a character in each control token that is spelled out, and that character; none if none is."""
        texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
        texts += answers
        if self.pattern is None or not any(map(self.pattern.search, texts)):
            return prompt, list(answers), ""
        mark = next(c for c in map(chr, range(0x10FFFF, 0, -1)) if not any(c in text for text in texts))
        cut = [self._cut(text, mark) for text in texts]
        parts, answers = cut[: len(texts) - len(answers)], cut[len(texts) - len(answers) :]
        if isinstance(prompt, str):
            return parts[0], answers, mark
        messages = [{**message, "content": part} for message, part in zip(prompt, parts, strict=True)]
        return messages, answers, mark

    def _cut(self, text: str, mark: str) -> str:
        assert self.pattern is not None
        return self.pattern.sub(lambda m: m[0][: self.cuts[m[0]]] + mark + m[0][self.cuts[m[0]] :], text)
