"""Texts → groups of token ids, by the one template of a backbone."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from inward import logs, metrics, tracing
from inward.errors import InternalError, InvalidField, InwardError, SetupError
from inward.prompts.chat_template import DATE, ChatTemplate
from inward.prompts.control_tokens import ControlTokens
from inward.prompts.length_limit import Grouped, fit_each, fit_length
from inward.prompts.turns import Turns
from inward.types import Group, Ids, Prompt

LOG = logs.logger("prompts")
DEFAULT_FORMAT = "{prompt}\n\n{response}"
"""For models without a chat template."""
ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
NOTHING = "prompt and response are both empty: there is no token to read"
SINGLE = (
    "a single token with nothing before it can't be judged: send what it answers as well, or text to which the chat "
    "template was applied"
)
CONTEXT = 3
"""Tokens that are decoded before one, so that it has the white space that it has in the text."""
INLINE_CHARACTERS = 20_000
"""Requests up to this size are tokenised on the event loop (about a millisecond): a thread would cost more than it
saves."""


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    chat_template: Any
    bos_token: str | None
    bos_token_id: int | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    added_tokens_decoder: Mapping[int, Any]

    def __len__(self) -> int: ...
    def __call__(self, text: list[str], *, add_special_tokens: bool, split_special_tokens: bool = False) -> Any: ...
    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool, **variables: Any
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
    """The prompt is text to which a template was applied already; see ``Turns.split``."""
    reserve: int = 0
    """Tokens of a response that is still to be drawn."""

    @property
    def characters(self) -> int:
        prompt = (
            len(self.prompt) if isinstance(self.prompt, str) else sum(len(m.get("content", "")) for m in self.prompt)
        )
        return prompt * max(1, len(self.responses)) + sum(map(len, self.responses))


class Prompts:
    """Renders and tokenises for one backbone.

    Args:
        tokenizer: the backbone's.
        max_tokens: most tokens of one prompt + response that the backbone takes; one is kept free for an EOS.
        format: a format string with ``{prompt}`` and, at its very end, ``{response}``; None takes the chat template, or
            ``DEFAULT_FORMAT`` where the tokenizer has none.
        end_ids: all ids that end a text of this model (``backbones.end_ids``), beside the tokenizer's own.

    Raises:
        SetupError: the format string lacks a field, or text follows the response.
    """

    def __init__(self, tokenizer: Tokenizer, *, max_tokens: int, format: str | None = None, end_ids: Ids = ()) -> None:
        if format is None and not tokenizer.chat_template:
            format = DEFAULT_FORMAT
        if format is not None and (format.count("{prompt}") != 1 or not format.endswith("{response}")):
            raise SetupError(
                f"the template {format!r} needs {{prompt}} once and must end with {{response}}, as in "
                f"{DEFAULT_FORMAT!r}"
            )
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self._format = format or DEFAULT_FORMAT
        self._adds_bos = (
            self._first_ids([""])[:1] == (tokenizer.bos_token_id,) if tokenizer.bos_token_id is not None else False
        )
        self._control = ControlTokens.of(tokenizer)
        ends = [tokenizer.decode([token], skip_special_tokens=False) for token in end_ids]
        self._chat = ChatTemplate(tokenizer) if format is None else None
        self.template = f"format:{format}" if self._chat is None else self._chat.name
        """Names it in a head's manifest."""
        if self._chat is not None and self._chat.prints_date:
            logs.event(LOG, "template_date_fixed", date=f"{DATE:%Y-%m-%d}")
        self.turns = Turns.of(tokenizer, ends, self._chat)

    def render(self, prompt: Prompt) -> str:
        """The text up to where the answer begins.

        Raises:
            InvalidField: messages that are empty, of an unknown role, end with the assistant, or that the chat template
                refuses or leaves out.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
        _check(messages)
        if self._chat is not None:
            return _rendered(self._chat, messages)
        text = messages[0]["content"] if len(messages) == 1 else _transcript(messages)
        return self._format.removesuffix("{response}").replace("{prompt}", text)

    def group(
        self,
        prompt: Prompt,
        responses: Sequence[str | Ids],
        *,
        truncate: bool = False,
        rendered: bool = False,
        reserve: int = 0,
    ) -> Grouped:
        """One prompt and its responses as token ids, the prompt with exactly one BOS. A ``rendered`` prompt is a string
        to which the template was applied already.

        Empty responses are legal. ``length_limit`` decides what is too long, and what is cut.

        Raises:
            InvalidField: text that is not Unicode, a conversation that the template refuses, no text at all, or a
                single token with no BOS before it.
            TooLarge: more tokens than the backbone takes, and ``truncate`` is off.
        """
        for i, response in enumerate(responses):
            if isinstance(response, str):
                _check_unicode(response, f"responses.{i}")
            else:
                self._check_ids(response, f"responses.{i}")
        written = [response if isinstance(response, str) else "" for response in responses]
        if rendered and isinstance(prompt, str):
            _check_unicode(prompt, "messages")
            text, broken = prompt, ""
        else:
            prompt, written, broken = self._control.broken(prompt, written)
            text = self.render(prompt)
        apart = self._ids([text, *written], broken)
        together = self._ids([text + response for response in written], broken)
        prompt_ids, n = self._one_bos(apart[0]), len(apart[0])
        tokenised = [
            whole[n:] if whole[:n] == apart[0] else alone for whole, alone in zip(together, apart[1:], strict=True)
        ]
        responses_ids = tuple(own if isinstance(r, str) else r for r, own in zip(responses, tokenised, strict=True))
        for i, ids in enumerate(responses_ids):
            if len(prompt_ids) + len(ids) < 2:  # models park attention on the very first token: its state says nothing
                raise InvalidField(SINGLE if text or responses[i] else NOTHING, param=f"responses.{i}")
        group = Group(prompt_ids, responses_ids)
        return fit_length(group, self.max_tokens, bos=self._bos, truncate=truncate, reserve=reserve)

    def each(self, grouped: Grouped) -> list[tuple[tuple[int, ...], Grouped]]:
        """``fit_each`` of a group that was cut; any other as it is."""
        if grouped.whole is None:
            return [(tuple(range(len(grouped.group.responses_ids))), grouped)]
        return fit_each(grouped.whole, self.max_tokens, bos=self._bos)

    @property
    def _bos(self) -> Ids:
        return () if self.tokenizer.bos_token_id is None else (self.tokenizer.bos_token_id,)

    def pieces(self, ids: Ids) -> list[str]:
        """The text of each token of a response; together they are its text. Of a character that takes several tokens
        the last one has all.
        """
        done: list[str] = []
        start, before = 0, ""  # from where on it is decoded again, and what is said already of that
        for i in range(len(ids)):
            text = str(self.tokenizer.decode(list(ids[start : i + 1]), skip_special_tokens=False))
            broken = text.endswith("\ufffd") and i + 1 < len(ids)
            done.append("" if broken else text[len(before) :])
            if not broken:
                before = str(
                    self.tokenizer.decode(list(ids[max(start, i - CONTEXT) : i + 1]), skip_special_tokens=False)
                )
                start = max(start, i - CONTEXT)
        return done

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

    def _try(self, texts: Texts) -> Grouped | InwardError:
        try:
            return self.group(
                texts.prompt,
                texts.responses,
                truncate=texts.truncate,
                rendered=texts.rendered,
                reserve=texts.reserve,
            )
        except InwardError as error:
            return error
        except Exception as error:  # a tokenizer's own failure: this item's, not its neighbours'
            return InternalError(f"this text could not be tokenised ({type(error).__name__})")

    def _ids(self, texts: list[str], broken: str = "") -> list[Ids]:
        """Of each text; one that has the character ``broken`` is tokenised as the pieces between."""
        if broken:
            return [self._joined(text.split(broken)) for text in texts]
        return [tuple(ids) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []

    def _joined(self, pieces: list[str]) -> Ids:
        """Pieces of one text, each tokenised by itself. Behind a line break, because some tokenizers put a space before
        what stands first.
        """
        (before,), (first, *others) = self._ids(["\n"]), self._ids([pieces[0], *("\n" + piece for piece in pieces[1:])])
        for piece, ids in zip(pieces[1:], others, strict=True):
            first += ids[len(before) :] if ids[: len(before)] == before else self._ids([piece])[0]
        return first

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


def _rendered(chat: ChatTemplate, messages: list[dict[str, str]]) -> str:
    """By the chat template, which must take every turn."""
    try:
        text = chat(messages, answer_next=True)
    except Exception as error:  # templates refuse by raising whatever they like
        raise InvalidField(f"the chat template refuses this conversation: {error}", param="messages") from error
    if (i := chat.left_out(messages)) is not None:
        raise InvalidField(
            f"the model's chat template leaves out this turn of the role {messages[i]['role']!r}: without it, it "
            "would be another conversation",
            param=f"messages.{i}.role",
        )
    return text


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
