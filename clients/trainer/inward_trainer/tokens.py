"""Conversation → token ids, the same ids that the service scores.

The service renders a prompt with the chat template up to where the answer begins, lets the answer follow as it is, and
tokenises both as one text with exactly one BOS. TRL would render the answer through the template as well, and train on
what templates write after it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

from transformers.utils.chat_template_utils import _compile_jinja_template

from inward_trainer.control_tokens import ControlTokens
from inward_trainer.errors import DataError
from inward_trainer.pairs import Prompt, ScoredPair

DATE = datetime(2024, 7, 26)
"""Today, for chat templates that print it; the service's."""
SHAPES_REMEMBERED = 1024
"""Orders of roles of which it is known whether the chat template writes them all."""


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
        DataError: the model has no EOS, the format lacks a field, or the chat template takes no text.
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
        self._control = ControlTokens.of(tokenizer)
        self._adds_bos = tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [
            tokenizer.bos_token_id
        ]
        source = str(tokenizer.chat_template)
        self._variables = {"strftime_now": DATE.strftime} if format is None and "strftime_now" in source else {}
        self.template = (
            f"chat:{hashlib.sha256(source.encode()).hexdigest()[:16]}" if format is None else f"format:{format}"
        ) + (f"@{DATE:%Y-%m-%d}" if self._variables else "")
        """As the service calls the same."""
        self._left_out = lru_cache(SHAPES_REMEMBERED)(self._probe)
        if format is None and self._left_out(("user",)):
            raise DataError(
                "the chat template writes nothing of what a user says: give a format string with --template"
            )
        self.eos_id = self._ending(eos_ids)
        """What the policy writes where its answer ends."""

    def render(self, prompt: Prompt) -> str:
        """The text up to where the answer begins.

        Raises:
            DataError: the chat template refuses the conversation, or leaves a turn out.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if self._format is None:
            return self._rendered(messages)
        text = messages[0]["content"] if len(messages) == 1 else _transcript(messages)
        return self._format.removesuffix("{response}").replace("{prompt}", text)

    def __call__(self, pair: ScoredPair) -> Tokens:
        """Both answers after the one prompt; those that the policy drew as it wrote them."""
        prompt, answers, broken = self._control.broken(pair.prompt, (pair.chosen, pair.rejected))
        rendered = self.render(prompt)
        before = self._ids(rendered, broken)
        ids = [
            self._answer(rendered, before, text, broken) if drawn is None else list(drawn)
            for text, drawn in zip(answers, (pair.chosen_ids, pair.rejected_ids), strict=True)
        ]
        chosen, rejected = (answer + [self.eos_id] * ended for answer, ended in zip(ids, pair.finished, strict=True))
        return Tokens(self._one_bos(before), chosen, rejected)

    def _rendered(self, messages: list[dict[str, str]]) -> str:
        try:
            text = self._apply(messages, answer_next=True)
        except Exception as error:  # templates refuse by raising whatever they like
            raise DataError(f"the chat template refuses the conversation: {error}") from error
        if role := self._left_out(tuple(message["role"] for message in messages)):
            raise DataError(f"the chat template leaves out a turn of the role {role!r}")
        return text

    def _probe(self, roles: tuple[str, ...]) -> str:
        """The role of the first turn that the chat template leaves out in such a conversation; empty if none."""
        turns = [{"role": role, "content": f"mzx{i}z"} for i, role in enumerate(roles)]
        try:
            text = self._apply(turns, answer_next=True)
        except Exception:  # a refusal is no silence
            return ""
        return next((turn["role"] for turn in turns if turn["content"] not in text), "")

    def _apply(self, messages: list[dict[str, str]], *, answer_next: bool) -> str:
        if not self._variables:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_next))
        # since 5.24 transformers gives a template no function of the caller's, such as one for the date
        template = _compile_jinja_template(self.tokenizer.chat_template)
        return str(
            template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=answer_next,
                **self.tokenizer.special_tokens_map, **self._variables,
            )
        )  # fmt: skip

    def _answer(self, rendered: str, before: list[int], text: str, broken: str) -> list[int]:
        """What follows the prompt's tokens; tokenised apart where a token would reach across the boundary."""
        whole = self._ids(rendered + text, broken)
        return whole[len(before) :] if whole[: len(before)] == before else self._ids(text, broken)

    def _ids(self, text: str, broken: str = "") -> list[int]:
        """Of a text; one that has the character ``broken`` is tokenised as the pieces between."""
        if broken:
            return self._joined(text.split(broken))
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _joined(self, pieces: list[str]) -> list[int]:
        """Pieces of one text, each tokenised by itself. Behind a line break, because some tokenizers put a space before
        what stands first.
        """
        before, joined = self._ids("\n"), self._ids(pieces[0])
        for piece in pieces[1:]:
            ids = self._ids("\n" + piece)
            joined += ids[len(before) :] if ids[: len(before)] == before else self._ids(piece)
        return joined

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
                closing = self._apply(turns, answer_next=False).partition("the-answer")[2]
            except Exception:  # templates refuse by raising whatever they like
                closing = ""
            if (ids := self._ids(closing)) and ids[0] in eos_ids:
                return ids[0]
        return eos_ids[0]


def _transcript(messages: list[dict[str, str]]) -> str:
    names = {"user": "Human: ", "assistant": "Assistant: "}
    return "\n\n".join([names.get(m["role"], "") + m["content"] for m in messages] + ["Assistant:"])
