"""What OpenAI's clients read. What a head says of a choice stands in the choice's field ``inward``."""

from __future__ import annotations

from typing import Any, Literal

from inward.types import FinishReason, Ids, Usage
from inward.wire.answers import NamedHead
from inward.wire.base import Wire

Finish = Literal["stop", "length", "content_filter"]


class PromptDetails(Wire):
    """Of the tokens of the prompt."""

    cached_tokens: int
    """Those that were found computed already."""


class DrawUsage(Wire):
    """Tokens, of all answers that were drawn, whether they are given or not."""

    prompt_tokens: int
    """Of the prompt, once."""
    completion_tokens: int
    """Of every answer that was drawn, as far as it was drawn."""
    total_tokens: int
    not_drawn_tokens: int
    """At most so many more would have been drawn of answers that were rejected, or ended by a guard."""
    prompt_tokens_details: PromptDetails

    @classmethod
    def of(cls, prompts: list[Ids], usages: list[Usage]) -> DrawUsage:
        """From what each prompt's drawing used, where a prompt counts once for each answer."""
        usage = sum(usages, Usage())
        prompt = sum(map(len, prompts))
        shared = usage.prompt_tokens - prompt
        drawn = max(usage.drawn_tokens, usage.completion_tokens)
        return cls(
            prompt_tokens=prompt,
            completion_tokens=drawn,
            total_tokens=prompt + drawn,
            not_drawn_tokens=usage.not_drawn_tokens,
            prompt_tokens_details=PromptDetails(cached_tokens=min(prompt, max(0, usage.cached_tokens - shared))),
        )


class Rating(Wire):
    """What the head says of a choice."""

    score: float | None
    """Null where it is not finite. Of an answer that was ended before its end, the score that ended it."""
    probability: float | None
    """Calibrated probability that the answer is acceptable, where the head is calibrated for it; null with a listwise
    head."""
    share: float | None
    """Of a listwise head: the answer's share of all that were drawn, by a softmax over their scores. Null with other
    heads, and where no other answer has a score."""
    drawn: int
    """Its place in the order of drawing, from 0."""
    of: int
    """How many were drawn."""
    finish_reason: FinishReason
    """In our own words: `guard` and `rejected` beside `stop` and `length`."""
    head: NamedHead
    policy_version: str


class Progress(Wire):
    """How far a drawing is, before its winner is known."""

    drawn: int
    """Answers that have ended."""
    of: int
    rejected: int = 0
    """Of those that have ended: how many by `early_rejection`."""
    not_drawn_tokens: int = 0
    """At most so many more would have been drawn of those that were rejected or ended by a guard."""
    best: float | None
    """The best score until now; null with a head that ranks only whole lists."""


class ChatMessage(Wire):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Wire):
    """One answer."""

    index: int
    """From 0, best first."""
    message: ChatMessage
    finish_reason: Finish
    logprobs: None = None
    inward: Rating


class DrawnAnswer(Wire):
    """What answers of both routes have."""

    id: str
    created: int
    model: str
    """The backbone."""


class ChatAnswer(DrawnAnswer):
    """Answer of `/v1/chat/completions`."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: DrawUsage


class CompletionChoice(Wire):
    """One continuation."""

    index: int
    """From 0: those of the first prompt, best first, then those of the next."""
    text: str
    finish_reason: Finish
    logprobs: None = None
    inward: Rating


class CompletionAnswer(DrawnAnswer):
    """Answer of `/v1/completions`."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: DrawUsage


class Model(Wire):
    """Something that a request may name as its `model`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["inward"] = "inward"
    inward: dict[str, Any]
    """What it is: `kind` is `backbone`, `policy` or `head`; of a policy `active`, of a head its `head_kind` and
    `version`."""


class ModelsAnswer(Wire):
    """Answer of `/v1/models`."""

    object: Literal["list"] = "list"
    data: list[Model]


def finish(reason: str | None) -> Finish:
    """The reason in OpenAI's words."""
    return "length" if reason in ("length", "rejected") else "content_filter" if reason == "guard" else "stop"
