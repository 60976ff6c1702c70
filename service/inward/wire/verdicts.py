"""Heads as judges in the formats of others: OpenAI's moderation and decisions, LiteLLM's guardrail. Unknown fields are
ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, StrictBool, StrictStr, Tag

from inward.errors import InvalidField
from inward.wire.base import Lenient, Wire
from inward.wire.compat import HeadName, ModelRequest, TextOrMessages, conversation, text_of, texts_of
from inward.wire.requests import Text

Rate = Annotated[float, Field(gt=0, le=0.5)]


def _parts(value: Any) -> str:
    first = value[0] if isinstance(value, list) and value else None
    return "as parts" if isinstance(first, dict) else "as many" if isinstance(value, list) else "as one"


ModerationInput = Annotated[
    Annotated[Text, Tag("as one")]
    | Annotated[list[Text], Field(min_length=1), Tag("as many")]
    | Annotated[list[dict[str, Any]], Field(min_length=1), Tag("as parts")],
    Discriminator(_parts),
]


class ModerationRequest(ModelRequest):
    """OpenAI's moderation. A `model` that is a head's name asks that head alone."""

    OWN: ClassVar[tuple[str, ...]] = ("head", "prompt", "false_positives")

    input: ModerationInput
    """A text, several, or the parts of one."""
    prompt: TextOrMessages | None = None
    """Inward's own: what the texts answer. Without it they are read as answers to nothing."""
    false_positives: Rate | None = None
    """Inward's own: share of acceptable texts that may be flagged by mistake, instead of the server's setting."""

    def texts(self) -> list[str]:
        """What is to be judged.

        Raises:
            InvalidField: a part is no text.
        """
        if isinstance(self.input, str):
            return [self.input]
        if isinstance(self.input[0], dict):
            return [text_of(self.input, "input")]
        return [text for text in self.input if isinstance(text, str)]


class Verdict(Wire):
    """What a head says of a text."""

    score: float
    """Raw; low is bad."""
    threshold: float
    """Scores below it are flagged."""
    false_positives: float
    """Share of acceptable texts of the head's calibration set that lie below the threshold."""
    estimated: bool
    """The calibration set's own scores were not kept, so the threshold is worked out of their tenths."""


class Moderation(Wire):
    """One text."""

    flagged: bool
    """Whether any head flags it."""
    categories: dict[str, bool]
    """For each head, whether it flags the text."""
    category_scores: dict[str, float]
    """For each head, how bad the text is, in [0, 1]: the calibrated probability that it is not acceptable."""
    category_applied_input_types: dict[str, list[Literal["text"]]]
    inward: dict[str, Verdict]
    """For each head, what its verdict comes from."""


class ModerationAnswer(Wire):
    """Answer of `/v1/moderations`."""

    id: str
    model: str
    results: list[Moderation]


class GuardrailParams(Lenient):
    """What a gateway's configuration may say (`additional_provider_specific_params`)."""

    OWN: ClassVar[tuple[str, ...]] = ("head", "false_positives", "text_only")

    head: HeadName | None = None
    """Who judges; by default the setting `guard_head`, else the first hybrid head."""
    false_positives: Rate | None = None
    """Share of acceptable texts that may be blocked by mistake, instead of the server's setting."""
    text_only: StrictBool = False
    """Let images and tool calls pass unread, instead of refusing what can't be judged."""


class GuardrailRequest(Lenient):
    """What LiteLLM asks its guardrails."""

    input_type: Literal["request", "response"] = "request"
    texts: list[Text] | None = None
    """What the user asked, or what the model answered."""
    structured_messages: list[dict[str, Any]] | None = None
    """The conversation; that of a response is its context."""
    images: list[Any] | None = None
    tool_calls: list[Any] | None = None
    additional_provider_specific_params: GuardrailParams | None = None

    def unread(self) -> str | None:
        """The first field that holds what can't be judged, unless that is to be let pass."""
        params = self.additional_provider_specific_params
        if params is not None and params.text_only:
            return None
        return "images" if self.images else "tool_calls" if self.tool_calls else None

    def context(self) -> str | list[dict[str, str]]:
        """What a response answers, where that came with it; without what may pass unread, but with all turns.

        Raises:
            InvalidField: a turn holds what can't be judged.
        """
        turns = list(self.structured_messages or []) if self.input_type == "response" else []
        while turns and turns[-1].get("role") == "assistant":
            turns.pop()
        params, field = self.additional_provider_specific_params, "structured_messages"
        if params is None or not params.text_only:
            return conversation(turns or "", field)
        return conversation([texts_of(turn) for turn in turns] or "", field)


class GuardrailAnswer(Wire):
    """Answer of `/beta/litellm_basic_guardrail_api`."""

    action: Literal["NONE", "BLOCKED"]
    blocked_reason: str | None = None
    """Which head, its score, and the threshold that it is below."""


class Choice(Lenient):
    """One of the options of a question."""

    value: StrictStr | StrictBool
    description: str | None = None

    @property
    def text(self) -> str:
        """As an answer."""
        word = self.value if isinstance(self.value, str) else "Yes" if self.value else "No"
        return f"{word}: {self.description}" if self.description else word


class Level(Lenient):
    """One of the ordered levels of a question."""

    label: str
    description: str | None = None


class Question(Lenient):
    """What is asked of the input."""

    type: Literal["predicate", "choice", "score"]
    name: Annotated[str, Field(max_length=256)] | None = None
    """Of a predicate or score: the head that answers; by default the first calibrated one. A name that is no head's is
    answered with a refusal, since no head knows what it means."""
    instructions: str | list[dict[str, Any]]
    """Of a choice: what is asked. Heads don't read it."""
    choices: Annotated[list[Choice], Field(min_length=2, max_length=255)] | None = None
    levels: Annotated[list[Level], Field(min_length=2, max_length=255)] | None = None


class DecisionRequest(ModelRequest):
    """OpenAI's decisions."""

    OWN: ClassVar[tuple[str, ...]] = ("head",)

    input: TextOrMessages
    """What is judged: a text, or a conversation, of which the last turn is."""
    questions: Annotated[list[Question], Field(min_length=1, max_length=400)]

    def instructions(self, i: int) -> str:
        """The text of a question.

        Raises:
            InvalidField: a part is no text.
        """
        return text_of(self.questions[i].instructions, f"questions.{i}.instructions")

    def check(self) -> None:
        """Raises ``InvalidField`` for a question without its choices or levels."""
        for i, question in enumerate(self.questions):
            needed = {"choice": "choices", "score": "levels"}.get(question.type)
            if needed and getattr(question, needed) is None:
                raise InvalidField(
                    f"a question of type {question.type!r} needs {needed}", param=f"questions.{i}.{needed}"
                )


class PredicateDecision(Wire):
    """How likely it is that the input is acceptable."""

    type: Literal["predicate"] = "predicate"
    name: str | None
    probability: float


class ChoiceProbability(Wire):
    """Of one choice."""

    value: StrictStr | StrictBool
    probability: float


class ChoiceDecision(Wire):
    """Which choice the ranker puts first."""

    type: Literal["choice"] = "choice"
    name: str | None
    choice: StrictStr | StrictBool
    confidence: float
    """Its probability."""
    probabilities: list[ChoiceProbability]
    """Softmax of the scores, in the order of the choices."""


class LevelProbability(Wire):
    """Of one level."""

    label: str
    value: int
    """Its place, from 0."""
    probability: float


class ScoreDecision(Wire):
    """On which level the input is."""

    type: Literal["score"] = "score"
    name: str | None
    score: float
    """The expected level, from 0."""
    confidence: float
    """The probability of the likeliest level."""
    probabilities: list[LevelProbability]


class Refusal(Wire):
    """No answer: no head knows what was asked, or it abstains."""

    type: Literal["refusal"] = "refusal"
    name: str | None


class InputDetails(Wire):
    cached_tokens: int
    cache_write_tokens: int = 0


class OutputDetails(Wire):
    reasoning_tokens: int = 0


class DecisionUsage(Wire):
    """Tokens that were read."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int = 0
    output_tokens_details: OutputDetails = OutputDetails()
    total_tokens: int


class DecisionAnswer(Wire):
    """Answer of `/v1/decisions`."""

    model: str
    answers: list[PredicateDecision | ChoiceDecision | ScoreDecision | Refusal]
    """In the order of the questions."""
    usage: DecisionUsage
