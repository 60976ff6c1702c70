"""What the native routes take, as pydantic models.

Two kinds of mistake are told apart. A wrong *shape* (a field missing, unknown or of the wrong type) is found here by
pydantic and refuses the request. Unusable *content* (roles in a wrong order, half a surrogate pair, nothing to score)
is found by ``parts`` or later, and fails its item only. That is why text is any Python string here, Unicode or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from pydantic import (
    ConfigDict,
    Discriminator,
    Field,
    InstanceOf,
    StrictBool,
    StrictFloat,
    StrictInt,
    Tag,
    WithJsonSchema,
    model_validator,
)

from inward.errors import InvalidField
from inward.types import Detail, Ids, Prompt
from inward.wire.base import Wire, at
from inward.wire.conversations import Context, joined, same

UNION_TAGS = frozenset({"as text", "as chat"})
"""Steps in the path of a pydantic error that are no field of the caller's JSON."""
RENAMED = {"scores": "append_to", "token_ids": "return_token_ids"}
"""Fields of ``/rerank`` under the names that they had, and those that they have."""
MOST = 2**31 - 1
"""Of whole numbers: what every part of the service can hold."""


def _examples(*bodies: dict[str, Any]) -> ConfigDict:
    """Of a request, for the OpenAPI document."""
    return ConfigDict(json_schema_extra={"examples": list(bodies)})


class Message(Wire):
    """One turn of a conversation."""

    role: Annotated[InstanceOf[str], WithJsonSchema({"type": "string", "examples": ["user", "assistant", "system"]})]
    """`system`, `developer`, `user`, `assistant` or `tool`."""
    content: Annotated[InstanceOf[str], WithJsonSchema({"type": "string"})]
    """The text of the turn."""


Text = Annotated[InstanceOf[str], WithJsonSchema({"type": "string"})]
Chat = Annotated[list[Message], Field(min_length=1)]
TextOrChat = Annotated[
    Annotated[Text, Tag("as text")] | Annotated[Chat, Tag("as chat")],
    Discriminator(lambda value: "as chat" if isinstance(value, list) else "as text"),
]


@dataclass(frozen=True, slots=True)
class Parts:
    """A prompt and its responses as plain values, and under which fields of the item they came."""

    prompt: Prompt
    responses: tuple[str | Ids, ...]
    prompt_field: str
    response_fields: tuple[str, ...]
    rendered: bool = False
    """The prompt is text to which a template was applied already."""
    turn_fields: tuple[str, ...] = ()
    """Of each message of the prompt, where they came in several fields."""

    def __post_init__(self) -> None:
        if not self.prompt:
            for response, field in zip(self.responses, self.response_fields, strict=True):
                if not response:
                    raise InvalidField("prompt and response are both empty: there is nothing to score", param=field)

    def blame(self, param: str | None) -> str | None:
        """The item's field for a field of the conversation that was made from it (``messages.0.content``,
        ``responses.1``).
        """
        head, _, rest = (param or "").partition(".")
        if head in ("response", "responses"):
            return self.response_fields[int(rest or 0)]
        if param == "prompt":
            return self.prompt_field
        if head != "messages":
            return param
        if isinstance(self.prompt, str) or not rest:
            return self.prompt_field
        turn, _, inner = rest.partition(".")
        where = self.turn_fields[int(turn)] if self.turn_fields else f"{self.prompt_field}.{turn}"
        return f"{where}.{inner}" if inner and where != self.prompt_field else where


class Scorable(Protocol):
    """An element of a request's list."""

    def parts(self) -> Parts:
        """The element as plain values.

        Raises:
            InvalidField: its content can't be scored; ``param`` is relative to the element.
        """
        ...


class PromptFields(Wire):
    """What stands before the answer, in one of two forms."""

    prompt: TextOrChat | None = None
    """What was asked: a text (one user turn) or the chat messages before the answer."""
    messages: Chat | None = None
    """Chat messages, oldest first, instead of `prompt`."""

    @model_validator(mode="after")
    def _one_form(self) -> PromptFields:
        if self.prompt is None and self.messages is None and not self._says_what_was_asked():
            raise at("prompt", "is missing; give `prompt`, or `messages`")
        if self.prompt is not None and self.messages is not None:
            raise at("messages", "can't stand beside `prompt`; give one of the two")
        return self

    def _says_what_was_asked(self) -> bool:
        """Whether some other field does."""
        return False

    def asked(self) -> tuple[str | list[dict[str, str]], str]:
        """The prompt, and the name of the field that holds it."""
        if self.messages is not None:
            return _plain(self.messages), "messages"
        return (_plain(self.prompt) if isinstance(self.prompt, list) else self.prompt or ""), "prompt"


class Item(PromptFields):
    """One response to score: `prompt` and `response`, or `messages` that end with the assistant's."""

    response: Text | None = None
    """The answer to `prompt`; with `messages` it is the last of them instead."""
    response_ids: list[Annotated[StrictInt, Field(ge=0, le=MOST)]] | None = None
    """Instead of `response`: the answer as the token ids that a model wrote, which need not be those that its text
    becomes again."""

    @model_validator(mode="after")
    def _one_response(self) -> Item:
        if self.response_ids is not None and (self.response is not None or self.messages is not None):
            raise at("response_ids", "stands beside `prompt` alone, instead of `response`")
        if self.prompt is not None and self.response is None and self.response_ids is None:
            raise at("response", "is missing; give the answer to `prompt`")
        if self.messages is not None and self.response is not None:
            raise at("response", "can't stand beside `messages`, whose last message is the response")
        return self

    def parts(self) -> Parts:
        """The conversation before the response, and the response."""
        prompt, field = self.asked()
        if self.response_ids is not None:
            return Parts(prompt, (tuple(self.response_ids),), field, ("response_ids",))
        if self.messages is None or isinstance(prompt, str):
            return Parts(prompt, (self.response or "",), field, ("response",))
        last = len(prompt) - 1
        if prompt[last]["role"] != "assistant":
            raise InvalidField(
                "the last message must be the assistant's: it is what is scored", param=f"messages.{last}.role"
            )
        if last == 0:
            raise InvalidField("a message is needed before the assistant's", param="messages")
        return Parts(prompt[:last], (prompt[last]["content"],), field, (f"messages.{last}.content",))


class PairItem(PromptFields):
    """A preference pair: one prompt, the preferred and the other answer."""

    chosen: TextOrChat
    """The preferred answer: a text, or a conversation that ends with it. Its earlier turns are context, as the prompt
    is, and may repeat it; a whole conversation needs no prompt."""
    rejected: TextOrChat
    """The other answer, in either form, after the same context."""

    def _says_what_was_asked(self) -> bool:
        return any(isinstance(answer, list) and len(answer) > 1 for answer in (self.chosen, self.rejected))

    def parts(self) -> Parts:
        """The prompt with all turns before the answers, and chosen and rejected in this order."""
        prompt, field = self.asked()
        (chosen, said, chosen_field), (rejected, other, rejected_field) = (
            _answer(answer, name) for answer, name in ((self.chosen, "chosen"), (self.rejected, "rejected"))
        )
        fields = (chosen_field, rejected_field)
        if not chosen.turns and not rejected.turns:
            return Parts(prompt, (said, other), field, fields)
        contexts = chosen, rejected
        if isinstance(prompt, list) or prompt.strip():
            asked = Context.of(prompt, field) if isinstance(prompt, list) else Context.of_text(prompt, field)
            contexts = joined(asked, chosen, "chosen"), joined(asked, rejected, "rejected")
        if not same(*(context.turns for context in contexts)):
            raise InvalidField(
                "chosen and rejected answer different prompts; they must be the same up to the last turn",
                param="rejected",
            )
        turns, places = contexts[0].turns, contexts[0].fields
        return Parts(turns, (said, other), "chosen" if not prompt else field, fields, turn_fields=places)


class ScoringOptions(Wire):
    """What every scoring request may say beside its texts."""

    head: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    """Name of the head; by default the first loaded one of the kinds that the route serves. See `GET /heads`."""
    truncate: StrictBool = False
    """Cut text that is longer than the model takes (the oldest of the prompt first) instead of refusing it."""
    timeout: Annotated[StrictFloat, Field(gt=0, allow_inf_nan=False)] | None = None
    """Seconds after which an answer is of no use and 504 is given; at most the server's own limit."""


class MarginRequest(ScoringOptions):
    """Preference pairs to annotate."""

    pairs: Annotated[list[PairItem], Field(min_length=1)]
    """Answered in this order."""
    model_config = _examples(
        {"pairs": [{"prompt": "How do I sharpen a knife?", "chosen": "Use a whetstone.", "rejected": "No idea."}]}
    )


class ScoreRequest(ScoringOptions):
    """Responses to score."""

    items: Annotated[list[Item], Field(min_length=1)]
    """Answered in this order."""
    detail: list[Detail] = Field(default_factory=list)
    """`layers`: each layer's part of the score. `tokens`: the score at every token of the response."""
    model_config = _examples({"items": [{"prompt": "How do I sharpen a knife?", "response": "Use a whetstone."}]})


class RewardRequest(ScoringOptions):
    """Responses, or preference pairs, to reward."""

    items: Annotated[list[Item], Field(min_length=1)] | None = None
    """Responses, answered in this order."""
    pairs: Annotated[list[PairItem], Field(min_length=1)] | None = None
    """Preference pairs instead of `items`."""
    detail: list[Detail] = Field(default_factory=list)
    """`layers`: each layer's probe output and gate weight. `tokens`: the score at every token of the response."""
    model_config = _examples({"items": [{"prompt": "How do I sharpen a knife?", "response": "Use a whetstone."}]})

    @model_validator(mode="after")
    def _one_list(self) -> RewardRequest:
        if self.items is None and self.pairs is None:
            raise at("items", "is missing; give `items`, or `pairs`")
        if self.items is not None and self.pairs is not None:
            raise at("pairs", "can't stand beside `items`; give one of the two")
        return self


class Sampling(Wire):
    """How answers are drawn; names and meanings are vLLM's."""

    max_tokens: Annotated[StrictInt, Field(ge=1, le=MOST)] | None = None
    """Most tokens of an answer; by default 256, or as many as the model still takes after the prompt."""
    temperature: Annotated[StrictFloat, Field(ge=0, le=10, allow_inf_nan=False)] = 1.0
    """0 takes the likeliest token each time, so that all answers are equal."""
    top_p: Annotated[StrictFloat, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[StrictInt, Field(ge=0, le=MOST)] = 0
    """0 takes all tokens."""
    min_p: Annotated[StrictFloat, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[StrictFloat, Field(gt=0, le=10, allow_inf_nan=False)] = 1.0
    seed: Annotated[StrictInt, Field(ge=0, lt=2**32)] | None = None
    """The same seed gives the same answers on the same machine and versions."""
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=16)] = Field(default_factory=list)
    """Texts that end an answer, and are not part of it."""


class RejectionOptions(Wire):
    """Which answers are not drawn to their end, so that more can be begun for the same tokens."""

    keep: Annotated[StrictFloat, Field(gt=0, lt=1)] | None = None
    """At each of `at`: the share of the answers still running that goes on, at least one."""
    at: Annotated[list[Annotated[StrictInt, Field(ge=1, le=MOST)]], Field(min_length=1, max_length=64)] | None = None
    """Tokens of an answer after which it is decided, ascending."""
    max_loss: Annotated[StrictFloat, Field(gt=0, lt=1)] | None = None
    """Instead of `keep` and `at`: the share of what the best of `n` gains over a single answer that may be lost on
    average, by the calibration of a value head, which is for one version of the head that ranks."""
    head: str | None = None
    """Whose running score decides. By default the value head that was fitted for the one that ranks (`inward fit
    value`), else the mean of that one's own scores so far."""
    in_pair: StrictBool = False
    """Let a rejected answer be the `rejected` of `pair`, cut as it is. Its score is the one that rejected it."""

    @model_validator(mode="after")
    def _one_rule(self) -> RejectionOptions:
        if self.max_loss is not None and (self.keep is not None or self.at is not None):
            raise at("max_loss", "can't stand beside `keep` or `at`; give one or the other")
        if self.max_loss is None and (self.keep is None or self.at is None):
            raise at("keep" if self.keep is None else "at", "is missing; give `keep` and `at`, or `max_loss`")
        if self.at is not None and self.at != sorted(set(self.at)):
            raise at("at", "must ascend")
        return self


class GuardOptions(Wire):
    """An answer ends as soon as its pooled score falls below a threshold. What follows its last safe token is not
    given.

    The threshold is given by one of `below`, `probability` and `fpr`.
    """

    head: str | None = None
    """Whose score it is; by default that of the head which ranks."""
    below: Annotated[StrictFloat, Field(allow_inf_nan=False)] | None = None
    """A score of the head."""
    probability: Annotated[StrictFloat, Field(gt=0, lt=1)] | None = None
    """A probability that the answer is acceptable, where the head is calibrated for it."""
    fpr: Annotated[StrictFloat, Field(gt=0, lt=1)] | None = None
    """The share of acceptable answers that may be ended, where the head is calibrated for it (`inward fit guard`)."""
    pool: Annotated[str, Field(max_length=64)] | None = None
    """How the scores of the tokens so far make one: `last`, `mean`, `max_ema:alpha=0.5`, `max_rolling:window=10`,
    `topk:k=10`. By default the head's own pool, else `max_ema`."""
    after: Annotated[StrictInt, Field(ge=0, le=MOST)] = 0
    """Tokens that are drawn whatever they score."""

    @model_validator(mode="after")
    def _one_threshold(self) -> GuardOptions:
        given = [name for name in ("below", "probability", "fpr") if getattr(self, name) is not None]
        if not given:
            raise at("below", "is missing; give `below`, `probability` or `fpr`")
        if len(given) > 1:
            raise at(given[1], f"can't stand beside `{given[0]}`; give one of them")
        return self


class RerankRequest(ScoringOptions, PromptFields):
    """Candidate answers to one prompt, given or to be drawn, to be ranked.

    Without a `head`, the first hybrid head ranks them, else the first LEGEND head, else the first ranker, unless the
    server is set otherwise.
    """

    candidates: Annotated[list[Text], Field(min_length=1)] | None = None
    """The answers to rank."""
    n: Annotated[StrictInt, Field(ge=1, le=MOST)] | None = None
    """Instead of `candidates`: how many answers to draw from the model."""
    sampling: Sampling | None = None
    """How they are drawn."""
    early_rejection: RejectionOptions | None = None
    """Which of them are not drawn to their end. They come after those that are, with `finish_reason` `rejected`."""
    stop_when: GuardOptions | None = None
    """When an answer is ended by a guard. It comes after those that were not, with `finish_reason` `guard`."""
    return_token_ids: StrictBool = False
    """Give each answer's token ids as well."""
    stream: StrictBool = False
    """Send drawn answers as server-sent events, each as soon as it is scored (or rejected), and the ranking in the
    end."""
    append_to: Annotated[str, Field(pattern="^[A-Za-z0-9._-]{1,64}$")] | None = None
    """Name of a stream in Redis to which the answer's `pair` is appended as well, for trainers that consume pairs as
    they come."""
    model_config = _examples(
        {"prompt": "How do I sharpen a knife?", "candidates": ["No idea.", "Use a whetstone."]},
        {"prompt": "How do I sharpen a knife?", "n": 8, "sampling": {"temperature": 0.8, "max_tokens": 128}},
        {"prompt": "How do I sharpen a knife?", "n": 16, "early_rejection": {"keep": 0.5, "at": [16, 32]}},
    )

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, value: Any) -> Any:
        for old, new in RENAMED.items():
            if isinstance(value, dict) and old in value:
                raise at(old, f"is called `{new}`")
        return value

    @model_validator(mode="after")
    def _given_or_drawn(self) -> RerankRequest:
        if self.candidates is None and self.n is None:
            raise at("candidates", "is missing; give `candidates`, or `n` to draw them")
        if self.candidates is not None and (self.n is not None or self.sampling is not None):
            raise at("candidates", "can't stand beside `n` or `sampling`; give one or the other")
        for name in ("stream", "early_rejection", "stop_when"):
            if self.candidates is not None and getattr(self, name):
                raise at(name, "is for answers that are drawn; given candidates are ranked together")
        return self


class UpdateRequest(Wire):
    """Labelled pairs for one online step of a head."""

    sequence: Annotated[StrictInt, Field(ge=1, le=MOST)]
    """Counts up from the head's last one; sending a step again changes nothing."""
    pairs: Annotated[list[PairItem], Field(min_length=1)]
    """All of them must be usable, or nothing is changed."""
    lr: Annotated[StrictFloat, Field(gt=0, le=1, allow_inf_nan=False)] = 1e-3
    """Learning rate of the step."""


class PolicyRequest(Wire):
    """Which adapter the backbone should carry from now on."""

    version: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
    """Name of a folder in the adapters folder, or `base` for none."""
    model_config = _examples({"version": "step-200"})


class ActivateRequest(Wire):
    """Which version of a head should answer from now on."""

    version: Annotated[StrictInt, Field(ge=1, le=MOST)]
    """A version that `GET /heads/{name}` lists."""


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _answer(answer: str | list[Message], field: str) -> tuple[Context, str, str]:
    """What stands before an answer, the answer, and the field that it came in."""
    if isinstance(answer, str):
        return Context([], ()), answer, field
    *before, last = _plain(answer)
    if last["role"] != "assistant":
        raise InvalidField("the last message must be the assistant's: it is what is compared", param=field)
    return Context.of(before, field), last["content"], f"{field}.{len(before)}.content"
