"""JSON of OpenAI's API as its clients send it: chat, completions. Answers are in ``wire.openai_answers``.

Fields that change nothing here are ignored. Those that ask for something that isn't done are refused by their name,
and so are misspelt ones of ours: an answer without what was asked for would be wrong without a word.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import (
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    Tag,
    field_validator,
    model_validator,
)
from pydantic.types import Discriminator

from inward.wire.base import Lenient, at
from inward.wire.compat import Messages, ModelRequest, TextOrTexts
from inward.wire.requests import MOST, GuardOptions, RejectionOptions, Sampling

SEEDS = 2**32
OFF = (None, False, 0, "none", "auto", {"type": "text"}, ["text"])
"""Values by which a client says that it doesn't want something."""
NOT_DONE = {
    "tools": "no tools are called here",
    "tool_choice": "no tools are called here",
    "functions": "no tools are called here",
    "function_call": "no tools are called here",
    "logprobs": "log probabilities are not given here",
    "top_logprobs": "log probabilities are not given here",
    "logit_bias": "tokens can't be favoured here",
    "frequency_penalty": "is not had here; `repetition_penalty` is",
    "presence_penalty": "is not had here; `repetition_penalty` is",
    "response_format": "answers are plain text here",
    "audio": "answers are plain text here",
    "modalities": "answers are plain text here",
    "web_search_options": "nothing is searched here",
    "suffix": "text is continued here, not filled in",
    "echo": "the prompt is not repeated here",
}
"""Fields that are refused, and why."""

Stops = Annotated[
    Annotated[str, Field(min_length=1), Tag("as one")]
    | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=16), Tag("as many")],
    Discriminator(lambda value: "as many" if isinstance(value, list) else "as one"),
]


class StreamOptions(Lenient):
    """How a stream ends."""

    include_usage: StrictBool | None = None
    """Send the usage as the last chunk."""


class DrawRequest(ModelRequest):
    """What chat and completions have in common. Any field may be null, which is as if it were not there."""

    BUDGETS: ClassVar[tuple[str, ...]] = ("max_completion_tokens", "max_tokens")
    OWN: ClassVar[tuple[str, ...]] = (
        "head", "truncate", "best_of", "top_k", "min_p", "repetition_penalty",
        "early_rejection", "stop_when", "timeout",
    )  # fmt: skip

    n: Annotated[StrictInt, Field(ge=1, le=MOST)] | None = None
    """How many answers to give; 1 by default."""
    best_of: Annotated[StrictInt, Field(ge=1, le=MOST)] | None = None
    """How many answers to draw, of which the `n` best by `head` are given, best first; by default `n`."""
    max_tokens: Annotated[StrictInt, Field(ge=1, le=MOST)] | None = None
    """Most tokens of an answer; by default 256, or as many as the model still takes after the prompt."""
    max_completion_tokens: Annotated[StrictInt, Field(ge=1, le=MOST)] | None = None
    """The newer name of `max_tokens`."""
    temperature: Annotated[StrictFloat, Field(ge=0, le=10, allow_inf_nan=False)] | None = None
    top_p: Annotated[StrictFloat, Field(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=-1, le=MOST)] | None = None
    """Inward's own, as vLLM's: 0 and -1 take all tokens."""
    min_p: Annotated[StrictFloat, Field(ge=0, le=1)] | None = None
    """Inward's own, as vLLM's."""
    repetition_penalty: Annotated[StrictFloat, Field(gt=0, le=10, allow_inf_nan=False)] | None = None
    """Inward's own, as vLLM's."""
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = None
    """The same seed gives the same answers on the same machine and versions."""
    stop: Stops | None = None
    """Texts that end an answer, and are not part of it."""
    stream: StrictBool | None = None
    """Send the answer as server-sent events: token by token while it is drawn. With `best_of` above 1 they tell the
    progress first."""
    stream_options: StreamOptions | None = None
    early_rejection: RejectionOptions | None = None
    """Inward's own, as on `/rerank`: which answers are not drawn to their end. They come last."""
    stop_when: GuardOptions | None = None
    """Inward's own, as on `/rerank`: when an answer is ended by a guard (`finish_reason` `content_filter`)."""
    timeout: Annotated[StrictFloat, Field(gt=0, allow_inf_nan=False)] | None = None
    """Inward's own: seconds after which an answer is of no use and 504 is given."""

    @model_validator(mode="before")
    @classmethod
    def _refused(cls, value: Any) -> Any:
        for field, why in NOT_DONE.items():
            if isinstance(value, dict) and field in value and not cls._off(field, value[field]):
                raise at(field, f"can't be used: {why}")
        return value

    @classmethod
    def _off(cls, field: str, value: Any) -> bool:
        """Whether a value says that the field isn't wanted."""
        return value in OFF or value in ({}, []) or value == 0

    @model_validator(mode="after")
    def _enough(self) -> DrawRequest:
        if self.drawn < self.given:
            raise at("best_of", f"is {self.drawn} and `n` is {self.given}: more can't be given than are drawn")
        return self

    @property
    def given(self) -> int:
        """How many answers are given."""
        return self.n or 1

    @property
    def drawn(self) -> int:
        """How many answers are drawn."""
        return self.best_of or self.given

    @property
    def budget_field(self) -> str:
        """The field that says how long an answer may be."""
        return next((name for name in self.BUDGETS if getattr(self, name) is not None), self.BUDGETS[-1])

    def sampling(self) -> Sampling:
        """How answers are drawn; what isn't said is as in ``/rerank``."""
        said = {name: getattr(self, name) for name in Sampling.model_fields if name not in ("max_tokens", "stop")}
        if self.seed is not None:
            said["seed"] = self.seed % SEEDS
        said["top_k"] = None if self.top_k is None else max(self.top_k, 0)
        said["max_tokens"] = getattr(self, self.budget_field)
        said["stop"] = [self.stop] if isinstance(self.stop, str) else self.stop
        return Sampling(**{name: value for name, value in said.items() if value is not None})


class ChatRequest(DrawRequest):
    """A conversation to go on with, as OpenAI's chat completions take it."""

    messages: Messages
    """Oldest first; content is a string or parts of text."""


class CompletionRequest(DrawRequest):
    """A text to go on with, as OpenAI's completions take it: no chat template is applied to it."""

    prompt: TextOrTexts
    """One or several; each has `n` choices."""

    @classmethod
    def _off(cls, field: str, value: Any) -> bool:
        """Here `logprobs` is a number, and 0 asks for that of the token that was drawn."""
        return (field != "logprobs" or value is None or value is False) and super()._off(field, value)

    @field_validator("prompt", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        first = value[0] if isinstance(value, list) and value else None
        if isinstance(first, int | list):
            raise ValueError("must be text; token ids are not taken here")
        return value

    def prompts(self) -> list[str]:
        """The texts."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt
