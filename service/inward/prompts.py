"""Conversation → token ids. The one place where a template is applied, so that fitting and serving see the same bytes.

A prompt is rendered up to the point where the answer begins (the chat template with its generation prompt, or the part
of the format string before ``{response}``); the response follows as it is. Prompt and response are tokenised
*together*, as one text. Where the boundary falls inside a token of that text (possible only without a special token
between them), they are tokenised apart, which is also what a model that samples an answer sees.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from inward import metrics, tracing
from inward.errors import InternalError, InvalidField, InwardError, SetupError, TooLarge
from inward.types import Group, Ids

Message = Mapping[str, str]
Prompt = str | Sequence[Message]
"""What stands before the answer: a string (one user turn) or chat messages, oldest first, that do not end with the
assistant."""

DEFAULT_FORMAT = "{prompt}\n\n{response}"
"""For models without a chat template."""
ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
INLINE_CHARACTERS = 20_000
"""Requests up to this size are tokenised on the event loop (about a millisecond): a thread would cost more than it
saves."""


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    chat_template: Any
    bos_token_id: int | None
    eos_token: str | None

    def __len__(self) -> int: ...
    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Any: ...
    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> Any: ...
    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> Any: ...


@dataclass(frozen=True, slots=True)
class Texts:
    """One prompt and the responses to it, before tokenisation."""

    prompt: Prompt
    responses: tuple[str | Ids, ...]
    """Texts, or token ids that are taken as they are."""
    truncate: bool = False
    rendered: bool = False
    """The prompt is text to which a template was applied already; see ``Prompts.split``."""

    @property
    def characters(self) -> int:
        prompt = (
            len(self.prompt) if isinstance(self.prompt, str) else sum(len(m.get("content", "")) for m in self.prompt)
        )
        return prompt * max(1, len(self.responses)) + sum(map(len, self.responses))


@dataclass(frozen=True, slots=True)
class Grouped:
    """A group ready for the queue, and whether text had to be cut for it."""

    group: Group
    truncated: bool = False


class Prompts:
    """Renders and tokenises for one backbone.

    Args:
        tokenizer: the backbone's.
        max_tokens: most tokens of one prompt + response that the backbone takes; one is kept free for an EOS.
        format: a format string with ``{prompt}`` and, at its very end, ``{response}``; None takes the chat template, or
            ``DEFAULT_FORMAT`` where the tokenizer has none.

    Raises:
        SetupError: the format string lacks a field, or text follows the response.
    """

    def __init__(self, tokenizer: Tokenizer, *, max_tokens: int, format: str | None = None) -> None:
        if format is None and not tokenizer.chat_template:
            format = DEFAULT_FORMAT
        if format is not None and (format.count("{prompt}") != 1 or not format.endswith("{response}")):
            raise SetupError(
                f"the template {format!r} needs {{prompt}} once and must end with {{response}}, as in {DEFAULT_FORMAT!r}"
            )
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self._format = format
        self._opening, closing = ("", "") if format is not None else _around_answers(tokenizer)
        self._endings = tuple({ending for ending in (closing, tokenizer.eos_token) if ending})
        self._adds_bos = (
            self._first_ids([""])[:1] == (tokenizer.bos_token_id,) if tokenizer.bos_token_id is not None else False
        )
        if format is not None:
            self.template = f"format:{format}"
        else:
            self.template = f"chat:{hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:16]}"

    def render(self, prompt: Prompt) -> str:
        """The text up to where the answer begins.

        Raises:
            InvalidField: messages that are empty, of an unknown role, end with the assistant, or that the chat template
                refuses.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
        _check(messages)
        if self._format is None:
            try:
                return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
            except Exception as error:  # templates refuse by raising whatever they like
                raise InvalidField(f"the chat template refuses this conversation: {error}", param="messages") from error
        text = messages[0]["content"] if len(messages) == 1 else _transcript(messages)
        return self._format.removesuffix("{response}").replace("{prompt}", text)

    def split(self, text: str, prompt: str = "") -> tuple[str, str]:
        """A rendered prompt and the response in a whole conversation to which a template was applied already, special
        tokens and all.

        The response begins after ``prompt`` where the text does, else after the last place at which the chat template
        lets an answer begin; where there is none, all of it is the prompt, and what is read at its end is the same.
        What the template writes after an answer, and end-of-sequence tokens, are taken off, so that the text scores as
        its prompt and response do by themselves.
        """
        text = self.strip(text)
        if prompt and text.startswith(prompt):
            return prompt, text[len(prompt) :]
        at = text.rfind(self._opening) if self._opening else -1
        start = at + len(self._opening) if at >= 0 else len(text)
        return text[:start], text[start:]

    def strip(self, response: str) -> str:
        """``response`` without what the template writes after it, and without end-of-sequence tokens."""
        while (end := next((end for end in self._endings if response.endswith(end)), None)) is not None:
            response = response[: -len(end)]
        return response

    def is_rendered(self, prompt: str) -> bool:
        """Whether a prompt ends as the chat template ends one, so that the template has been applied already."""
        return bool(self._opening) and prompt.endswith(self._opening)

    def group(
        self, prompt: Prompt, responses: Sequence[str | Ids], *, truncate: bool = False, rendered: bool = False
    ) -> Grouped:
        """One prompt and its responses as token ids, the prompt with exactly one BOS. A ``rendered`` prompt is a string
        to which the template was applied already.

        Truncation cuts the oldest tokens of the prompt (never its BOS), the same for all responses; a response that
        would leave the prompt less than a quarter of the room loses its end. Empty responses are legal.

        Raises:
            InvalidField: text that is not Unicode, a conversation that the template refuses, or no text at all.
            TooLarge: more tokens than the backbone takes, and ``truncate`` is off.
        """
        text = self._as_it_is(prompt) if rendered and isinstance(prompt, str) else self.render(prompt)
        for i, response in enumerate(responses):
            if isinstance(response, str):
                _check_unicode(response, f"responses.{i}")
            else:
                self._check_ids(response, f"responses.{i}")
        written = [response if isinstance(response, str) else "" for response in responses]
        apart = self._ids([text, *written])
        together = self._ids([text + response for response in written])
        prompt_ids, n = self._one_bos(apart[0]), len(apart[0])
        if not prompt_ids and not all(responses):
            raise InvalidField("prompt and response are both empty: there is no token to read", param="response")
        tokenised = [
            whole[n:] if whole[:n] == apart[0] else alone for whole, alone in zip(together, apart[1:], strict=True)
        ]
        responses_ids = tuple(own if isinstance(r, str) else r for r, own in zip(responses, tokenised, strict=True))
        return self._fit(prompt_ids, responses_ids, truncate)

    async def group_many(self, texts: Sequence[Texts]) -> list[Grouped | InwardError]:
        """``group`` for each, errors in place of the ones that can't be used; off the event loop where it is much."""
        with metrics.TOKENIZE_SECONDS.time(), tracing.step("tokenize"):
            if sum(t.characters for t in texts) <= INLINE_CHARACTERS:
                return [self._try(t) for t in texts]
            return await asyncio.to_thread(lambda: [self._try(t) for t in texts])

    def _check_ids(self, ids: Ids, where: str) -> None:
        if any(token >= len(self.tokenizer) for token in ids):
            raise InvalidField(
                f"token id {max(ids)} is not in the tokenizer's vocabulary of {len(self.tokenizer)}", param=where
            )

    def _as_it_is(self, rendered: str) -> str:
        _check_unicode(rendered, "messages")
        return rendered

    def _try(self, texts: Texts) -> Grouped | InwardError:
        try:
            return self.group(texts.prompt, texts.responses, truncate=texts.truncate, rendered=texts.rendered)
        except InwardError as error:
            return error
        except Exception as error:  # a tokenizer's own failure: this item's, not its neighbours'
            return InternalError(f"this text could not be tokenised ({type(error).__name__})")

    def _fit(self, prompt_ids: Ids, responses_ids: tuple[Ids, ...], truncate: bool) -> Grouped:
        room = self.max_tokens - 1  # one EOS
        longest = max(map(len, responses_ids), default=0)
        if len(prompt_ids) + longest <= room:
            return Grouped(Group(prompt_ids, responses_ids))
        if not truncate:
            worst = max(range(len(responses_ids)), key=lambda i: len(responses_ids[i]), default=0)
            raise TooLarge(
                f"prompt ({len(prompt_ids)} tokens) and response ({longest}) are longer than the {room} tokens that the model takes; "
                "shorten them, or send \"truncate\": true",
                param=f"responses.{worst}" if responses_ids else "prompt",
            )  # fmt: skip
        bos = prompt_ids[:1] if prompt_ids[:1] == (self.tokenizer.bos_token_id,) else ()
        least = min(len(prompt_ids), room // 4)  # of the prompt, so that a long response never stands without one
        responses_ids = tuple(ids[: room - least] for ids in responses_ids)
        keep = room - len(bos) - max(map(len, responses_ids), default=0)
        rest = prompt_ids[len(bos) :]
        return Grouped(Group(bos + rest[max(0, len(rest) - keep) :], responses_ids), truncated=True)

    def _ids(self, texts: list[str]) -> list[Ids]:
        return [tuple(ids) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []

    def _first_ids(self, texts: list[str]) -> Ids:
        return tuple(self.tokenizer(texts, add_special_tokens=True)["input_ids"][0])

    def _one_bos(self, ids: Ids) -> Ids:
        """Templates write a BOS or leave it to the tokenizer, some models do both, some none: exactly one where the
        model has one.
        """
        bos = self.tokenizer.bos_token_id
        if bos is None:
            return ids
        text = ids
        while text[:1] == (bos,):
            text = text[1:]
        return (bos, *text) if len(text) < len(ids) or self._adds_bos else ids


def _around_answers(tokenizer: Tokenizer) -> tuple[str, str]:
    """What the chat template writes before an answer that is to be generated, and after one that is there; empty
    where it can't be told.
    """

    def render(*messages: dict[str, str], answer_next: bool = False) -> str:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer_next))

    question, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "the-answer"}
    try:
        asked, opened, answered = render(question), render(question, answer_next=True), render(question, answer)
    except Exception:  # templates refuse by raising whatever they like
        return "", ""
    opening = opened[len(asked) :] if opened.startswith(asked) else ""
    return opening, answered.rpartition("the-answer")[2]


def _check(messages: list[dict[str, str]]) -> None:
    if not messages:
        raise InvalidField("messages are empty: at least one is needed before the answer", param="messages")
    for i, message in enumerate(messages):
        if message.get("role") not in ROLES:
            raise InvalidField(
                f"role {message.get('role')!r} is none of {', '.join(sorted(ROLES))}", param=f"messages.{i}.role"
            )
        if not isinstance(message.get("content"), str):
            raise InvalidField("content must be a string", param=f"messages.{i}.content")
        _check_unicode(message["content"], f"messages.{i}.content")
    if messages[-1]["role"] == "assistant":
        raise InvalidField(
            "the conversation before the answer ends with the assistant", param=f"messages.{len(messages) - 1}.role"
        )


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidField(
            f"character {error.start} is half of a surrogate pair, which is not Unicode text", param=where
        ) from None


def _transcript(messages: list[dict[str, str]]) -> str:
    """Several turns for a model without a chat template, in the form of the HH data."""
    names = {"user": "Human: ", "assistant": "Assistant: "}
    return "\n\n".join([names.get(m["role"], "") + m["content"] for m in messages] + ["Assistant:"])
