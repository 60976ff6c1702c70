"""Conversation → token ids, the same ids that the service scores.

The service renders a prompt with the chat template up to where the answer begins, lets the answer follow as it is, and
tokenises both as one text with exactly one BOS. TRL would render the answer through the template as well, and train on
what templates write after it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from inward_trainer.errors import DataError
from inward_trainer.pairs import Prompt, ScoredPair


@dataclass(frozen=True, slots=True)
class Tokens:
    """One pair as the collator takes it; answers that ended by themselves end with an EOS."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    @property
    def longest(self) -> int:
        """Tokens of prompt and the longer answer."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


class Tokeniser:
    """Renders and tokenises as the service does.

    Args:
        tokenizer: the policy's, from Hugging Face.
        format: for a model without a chat template, a string with ``{prompt}`` that ends with ``{response}``; the
            service's ``--template``.
        eos_ids: what ends a text of this model; by default the tokenizer's EOS.

    Raises:
        DataError: the model has no EOS, or the format lacks a field.
    """

    DEFAULT_FORMAT = "{prompt}\n\n{response}"

    def __init__(self, tokenizer: Any, format: str | None = None, eos_ids: Sequence[int] = ()) -> None:
        eos_ids = eos_ids or [id for id in (tokenizer.eos_token_id,) if id is not None]
        if not eos_ids:
            raise DataError("the tokenizer has no end-of-sequence token, so a policy could never learn to stop")
        if format is None and not tokenizer.chat_template:
            format = self.DEFAULT_FORMAT
        if format is not None and (format.count("{prompt}") != 1 or not format.endswith("{response}")):
            raise DataError(f"the template {format!r} needs {{prompt}} once and must end with {{response}}")
        self.tokenizer, self._format = tokenizer, format
        self._control = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._adds_bos = tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [
            tokenizer.bos_token_id
        ]
        self.eos_id = self._ending(eos_ids)
        """What the policy writes where its answer ends."""
        self.template = (
            f"format:{format}"
            if format is not None
            else f"chat:{hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:16]}"
        )
        """As the service calls the same."""

    def render(self, prompt: Prompt) -> str:
        """The text up to where the answer begins."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if self._format is None:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        text = messages[0]["content"] if len(messages) == 1 else _transcript(messages)
        return self._format.removesuffix("{response}").replace("{prompt}", text)

    def __call__(self, pair: ScoredPair) -> Tokens:
        """Both answers after the one prompt; those that the policy drew as it wrote them."""
        rendered = self.render(pair.prompt)
        prompt = self._ids(rendered)
        answers = [
            (self._answer(rendered, prompt, text) if ids is None else list(ids)) + ([self.eos_id] if finished else [])
            for text, ids, finished in zip(
                (pair.chosen, pair.rejected), (pair.chosen_ids, pair.rejected_ids), pair.finished, strict=True
            )
        ]
        return Tokens(self._one_bos(prompt), *answers)

    def _answer(self, rendered: str, prompt: list[int], text: str) -> list[int]:
        """What follows the prompt's tokens; tokenised apart where a token would reach across the boundary, or where the
        text spells a control token, which is text in an answer.
        """
        if any(token in text for token in self._control):
            return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
        whole = self._ids(rendered + text)
        return whole[len(prompt) :] if whole[: len(prompt)] == prompt else self._ids(text)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _one_bos(self, ids: list[int]) -> list[int]:
        bos = self.tokenizer.bos_token_id
        if bos is None:
            return ids
        text = ids
        while text[:1] == [bos]:
            text = text[1:]
        return [bos, *text] if len(text) < len(ids) or self._adds_bos else ids

    def _ending(self, eos_ids: Sequence[int]) -> int:
        """Of the model's EOS ids the one that its chat template writes after an answer: that one it has learnt."""
        if self._format is None:
            turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "the-answer"}]
            try:
                answered = str(self.tokenizer.apply_chat_template(turns, tokenize=False))
            except Exception:  # templates refuse by raising whatever they like
                answered = ""
            closing = self._ids(answered.rpartition("the-answer")[2]) if "the-answer" in answered else []
            if closing[:1] and closing[0] in eos_ids:
                return closing[0]
        return eos_ids[0]


def _transcript(messages: list[dict[str, str]]) -> str:
    names = {"user": "Human: ", "assistant": "Assistant: "}
    return "\n\n".join([names.get(m["role"], "") + m["content"] for m in messages] + ["Assistant:"])
