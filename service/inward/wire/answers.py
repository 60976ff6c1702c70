"""What the native routes give, as pydantic models."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from inward.types import FinishReason, HeadRef, Kind, Usage
from inward.wire.base import Wire


class ErrorDetail(Wire):
    """What went wrong."""

    message: str
    """What was wrong, where, and what to do."""
    type: str
    """The family of the error, such as `invalid_request_error`."""
    param: str | None = None
    """Path of the field to blame, such as `pairs.3.chosen`."""
    code: str
    """The error itself, such as `too_large`."""


class ErrorBody(Wire):
    """The one shape in which every error is reported."""

    error: ErrorDetail


class NamedHead(Wire):
    """Which head gave the answer."""

    name: str
    kind: Kind
    version: int

    @classmethod
    def of(cls, ref: HeadRef) -> NamedHead:
        """From the value that the engine gives."""
        return cls(**asdict(ref))


class TokenUsage(Wire):
    """Tokens of the items that were computed. A prompt counts once for each response that continues it."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    """Prompt tokens that did not have to be computed again."""
    drawn_tokens: int = 0
    """Of drawn answers: all that were drawn, those that are not given included."""
    not_drawn_tokens: int = 0
    """At most so many more would have been drawn of the answers that were rejected or ended by a guard."""

    @classmethod
    def of(cls, usage: Usage) -> TokenUsage:
        """From the value that the engine gives."""
        return cls(**asdict(usage))


class Answer(Wire):
    """What every answer names. All of its scores come from this version of the head and of the policy."""

    model: str
    """The backbone."""
    policy_version: str
    """Which adapter the backbone carried."""
    head: NamedHead
    usage: TokenUsage


class PolicyActivation(Wire):
    """A version that was switched to."""

    policy_version: str
    activated: str
    """When (ISO 8601, UTC)."""


class PolicyAnswer(Wire):
    """Answer of `/policy`."""

    policy_version: str
    """What the backbone carries: the name of an adapter, or `base`."""
    previous: str | None
    """What it carried before; none since the start."""
    available: list[str]
    """What can be switched to."""
    history: list[PolicyActivation]
    """The newest last; the first is what the service started with, unless that is long ago."""


class Element(Wire):
    """What every element of an answer's list has."""

    error: ErrorDetail | None = None
    """Why this element has no score; the others are not harmed."""
    truncated: bool = False
    """Text was cut because it is longer than the model takes and `truncate` was set."""


class Margin(Element):
    """LEGEND's annotation of one pair."""

    margin: float | None = None
    """Score of chosen minus score of rejected."""
    margin_scaled: float | None = None
    """`margin` divided by the standard deviation of margins at calibration."""
    bin: float | None = None
    """Quantile of the margin as a value in [0, 1], for a margin loss."""
    chosen_score: float | None = None
    rejected_score: float | None = None
    label_agrees: bool | None = None
    """Whether the margin's sign is the label's; null for a tie."""
    label_probability: float | None = None
    """Probability in [0, 1] that the label is right, by this margin: calibrated on held-out pairs, where the head is
    calibrated for it."""
    confidence: float | None = None
    """Gamma of the hybrid reward, where a hybrid head is loaded: the weight of the label in cDPO, for a trainer. It is
    not calibrated, and by default never below 0.5."""


class Score(Element):
    """The score of one item."""

    score: float | None = None
    probability: float | None = None
    """Calibrated probability that the response is acceptable, where the head is calibrated for it."""
    layers: dict[str, Any] | None = None
    """Detail `layers`: each layer's part (`layers`, `values`, for a hybrid head also `gates`)."""
    tokens: list[float] | None = None
    """Detail `tokens`: the score at every token of the response."""
    token_texts: list[str] | None = None
    """Detail `tokens`: the text of every token; together they are the response. A token that ends within a character
    has none, and the next one has all of it."""
    map: list[list[float]] | None = None
    """Details `tokens` and `layers`, of a hybrid head: for every token each layer's part of its score, in the order of
    `layers`."""


class RewardPair(Element):
    """The hybrid reward of both answers of a pair."""

    chosen_score: float | None = None
    rejected_score: float | None = None
    chosen_probability: float | None = None
    rejected_probability: float | None = None
    margin: float | None = None
    """Score of chosen minus score of rejected."""
    label_agrees: bool | None = None
    """Whether the margin's sign is the label's; null for a tie."""
    label_probability: float | None = None
    """Probability in [0, 1] that the label is right, by this margin: calibrated on held-out pairs, where the head is
    calibrated for it."""
    confidence: float | None = None
    """Gamma of the hybrid reward: the weight of the label in cDPO, for a trainer. It is not calibrated, and by default
    never below 0.5."""
    confidence_calibrated: float | None = None
    """The same as `label_probability`."""
    chosen_layers: dict[str, Any] | None = None
    """Detail `layers`, of the chosen answer."""
    rejected_layers: dict[str, Any] | None = None
    chosen_tokens: list[float] | None = None
    """Detail `tokens`, of the chosen answer."""
    rejected_tokens: list[float] | None = None


class Ranked(Element):
    """One candidate in its place."""

    index: int
    """Its place in the request, or in the order of drawing, from 0."""
    text: str | None
    """None where it is not Unicode text."""
    score: float | None = None
    """None for candidates that can't be scored; they stand last. Of an answer that was rejected or ended by a guard:
    the score that ended it, which may be another head's; it stands after those that were drawn to their end."""
    probability: float | None = None
    """Calibrated probability that the response is acceptable, where the head is calibrated for it; null with a listwise
    head."""
    share: float | None = None
    """Of a listwise head: the candidate's share of the list, by a softmax over its scores. It says nothing of whether
    any of them is acceptable. Null with other heads, and where no other candidate has a score."""
    completion_tokens: int | None = None
    drawn_tokens: int | None = None
    """Of a drawn answer: all that were drawn, those that are not given included."""
    not_drawn_tokens: int | None = None
    """Of a drawn answer: at most so many more would have been drawn, had it not been rejected or ended by a guard."""
    token_ids: list[int] | None = None
    """Of the answer, if asked for. `/score` takes them as `response_ids`, and then scores exactly what was scored
    here."""
    finish_reason: FinishReason | None = None
    """Of a drawn answer: whether it ended by itself (`stop`), stands cut at its length limit (`length`), was ended by
    `stop_when` (`guard`) or by `early_rejection` (`rejected`)."""


class BestAgainstWorst(Wire):
    """A preference pair made of the first and the last scored candidate, ready for DPO."""

    prompt: str | list[dict[str, str]]
    chosen: str
    rejected: str
    chosen_score: float
    rejected_score: float
    margin: float
    confidence: float | None = None
    """Gamma of the hybrid reward, where a hybrid head is loaded: the weight of the pair's label in cDPO."""
    chosen_finish_reason: FinishReason | None = None
    """Of a drawn answer; only one that ended by itself (`stop`) should be followed by an end-of-sequence token in
    training."""
    rejected_finish_reason: FinishReason | None = None


class MarginAnswer(Answer):
    """Answer of `/margin`."""

    margins: list[Margin]
    """In the order of the pairs."""


class ScoreAnswer(Answer):
    """Answer of `/score`."""

    scores: list[Score]
    """In the order of the items."""


class RewardAnswer(Answer):
    """Answer of `/reward`."""

    rewards: list[Score] | list[RewardPair]
    """In the order of the items or pairs."""


class RerankAnswer(Answer):
    """Answer of `/rerank`."""

    results: list[Ranked]
    """Best first."""
    best: Ranked
    """The first of `results`."""
    pair: BestAgainstWorst | None = None
    """Where two candidates have different scores."""
    listwise: bool
    """Whether a score depends on the other candidates."""
