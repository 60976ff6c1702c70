"""Conversation → token ids, the same ids that the service scores.

The service renders a prompt with the chat template up to where the answer begins, lets the answer follow as it is, and
tokenises both as one text with exactly one BOS. TRL would render the answer through the template as well, and train on
what templates write after it.
"""

from __future__ import annotations

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

    Raises:
        DataError: the tokenizer has no EOS, or the format lacks a field.
    """

    DEFAULT_FORMAT = "{prompt}\n\n{response}"

    def __init__(self, tokenizer: Any, format: str | None = None) -> None:
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no end-of-sequence token, so a policy could never learn to stop")
        if format is None and not tokenizer.chat_template:
            format = self.DEFAULT_FORMAT
        if format is not None and (format.count("{prompt}") != 1 or not format.endswith("{response}")):
            raise DataError(f"the template {format!r} needs {{prompt}} once and must end with {{response}}")
        self.tokenizer, self._format = tokenizer, format
        self._adds_bos = tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [
            tokenizer.bos_token_id
        ]

    def render(self, prompt: Prompt) -> str:
        """The text up to where the answer begins."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if self._format is None:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        text = messages[0]["content"] if len(messages) == 1 else _transcript(messages)
        return self._format.removesuffix("{response}").replace("{prompt}", text)

    def __call__(self, pair: ScoredPair) -> Tokens:
        """Both answers after the one prompt."""
        rendered = self.render(pair.prompt)
        prompt = self._ids(rendered)
        answers = [
            self._answer(rendered, prompt, text) + ([self.tokenizer.eos_token_id] if finished else [])
            for text, finished in zip((pair.chosen, pair.rejected), pair.finished, strict=True)
        ]
        return Tokens(self._one_bos(prompt), *answers)

    def _answer(self, rendered: str, prompt: list[int], text: str) -> list[int]:
        """What follows the prompt's tokens; tokenised apart where a token would reach across the boundary."""
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


def _transcript(messages: list[dict[str, str]]) -> str:
    names = {"user": "Human: ", "assistant": "Assistant: "}
    return "\n\n".join([names.get(m["role"], "") + m["content"] for m in messages] + ["Assistant:"])
