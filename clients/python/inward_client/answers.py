"""What the service answers, as frozen values; fields that this version does not know are left out, missing ones keep
their default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import TYPE_CHECKING, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from inward_client.errors import UnreadableAnswer

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")


@dataclass(frozen=True)
class ItemError:
    """Why one element has no score."""

    message: str = ""
    type: str = ""
    param: str | None = None
    """Path of the field to blame in the list that was given, such as ``pairs.3.chosen``."""
    code: str = ""


@dataclass(frozen=True)
class Head:
    """Which head gave an answer."""

    name: str
    kind: str
    version: int


@dataclass(frozen=True)
class Usage:
    """Tokens that were computed. A prompt counts once for each response that continues it."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    drawn_tokens: int = 0
    """Of drawn answers: all that were drawn, those that are not given included."""
    not_drawn_tokens: int = 0
    """At most so many more would have been drawn of the answers that were rejected or ended by a guard."""

    def __add__(self, other: Usage) -> Usage:
        return Usage(**{name: tokens + getattr(other, name) for name, tokens in vars(self).items()})


@dataclass(frozen=True)
class Margin:
    """Of one pair; every number is None where ``error`` is set."""

    error: ItemError | None = None
    truncated: bool = False
    margin: float | None = None
    """Score of chosen minus score of rejected; negative: the label looks flipped."""
    margin_scaled: float | None = None
    """In standard deviations of the margins at calibration."""
    bin: float | None = None
    """In [0, 1], for a margin loss."""
    chosen_score: float | None = None
    rejected_score: float | None = None
    label_agrees: bool | None = None
    """None for a tie."""
    label_probability: float | None = None
    """Calibrated probability that the label is right, where the head is calibrated for it."""
    confidence: float | None = None
    """Gamma of cDPO, for a trainer, where a hybrid head is loaded; it is not calibrated."""


@dataclass(frozen=True)
class Score:
    """Of one item; ``score`` is None where ``error`` is set."""

    error: ItemError | None = None
    truncated: bool = False
    score: float | None = None
    probability: float | None = None
    """Calibrated probability that the response is acceptable, where the head is calibrated for it."""
    layers: Mapping[str, Any] | None = None
    tokens: list[float] | None = None
    token_texts: list[str] | None = None
    """Of every token; together they are the response."""
    map: list[list[float]] | None = None
    """For every token each layer's part, where ``layers`` and ``tokens`` were asked for of a hybrid head."""


@dataclass(frozen=True)
class RewardPair:
    """Of one pair; every number is None where ``error`` is set."""

    error: ItemError | None = None
    truncated: bool = False
    chosen_score: float | None = None
    rejected_score: float | None = None
    chosen_probability: float | None = None
    rejected_probability: float | None = None
    margin: float | None = None
    label_agrees: bool | None = None
    """None for a tie."""
    label_probability: float | None = None
    """Calibrated probability that the label is right, where the head is calibrated for it."""
    confidence: float | None = None
    """Gamma of cDPO, for a trainer; it is not calibrated."""
    confidence_calibrated: float | None = None
    """The same as ``label_probability``."""
    chosen_layers: Mapping[str, Any] | None = None
    rejected_layers: Mapping[str, Any] | None = None
    chosen_tokens: list[float] | None = None
    rejected_tokens: list[float] | None = None


@dataclass(frozen=True)
class Ranked:
    """One candidate in its place."""

    index: int
    """Its place among the candidates that were given or drawn."""
    text: str | None = None
    error: ItemError | None = None
    truncated: bool = False
    score: float | None = None
    """Of an answer that was rejected or ended by a guard: the score that ended it."""
    probability: float | None = None
    """Calibrated probability that the response is acceptable; None with a listwise head."""
    share: float | None = None
    """Of a listwise head: softmax over the list. It says nothing of whether any candidate is acceptable."""
    completion_tokens: int | None = None
    drawn_tokens: int | None = None
    """Of a drawn answer: all that were drawn, those that are not given included."""
    not_drawn_tokens: int | None = None
    """Of a drawn answer: at most so many more would have been drawn, had it not been rejected or ended by a guard."""
    token_ids: list[int] | None = None
    """If asked for. ``score`` takes them as ``response_ids``, and then scores exactly what was scored here."""
    finish_reason: str | None = None
    """Of a drawn answer: ``stop``, ``length`` (cut at its limit), ``guard`` or ``rejected``."""


@dataclass(frozen=True)
class BestAgainstWorst:
    """A preference pair, ready for DPO."""

    prompt: Any
    """As it was given: a text, or messages."""
    chosen: str
    rejected: str
    margin: float
    chosen_score: float | None = None
    rejected_score: float | None = None
    confidence: float | None = None
    """Gamma of cDPO, where a hybrid head is loaded."""
    chosen_finish_reason: str | None = None
    rejected_finish_reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What every answer names; all its scores come from this version of the head and of the policy."""

    model: str
    policy_version: str
    head: Head
    usage: Usage = field(default_factory=Usage)

    def to_pandas(self) -> pd.DataFrame:
        """Its list as a frame, one row an element, with the reason of a missing score in ``error``.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError:
            raise ImportError("to_pandas needs pandas: pip install pandas") from None
        elements: list[Any] = next(value for value in vars(self).values() if isinstance(value, list))
        rows = [{**vars(one), "error": one.error.message if one.error else None} for one in elements]
        return pd.DataFrame(rows, columns=None if rows else ["error"])


@dataclass(frozen=True, kw_only=True)
class MarginAnswer(Answer):
    """Answer of ``margin``."""

    margins: list[Margin]
    """In the order of the pairs."""


@dataclass(frozen=True, kw_only=True)
class ScoreAnswer(Answer):
    """Answer of ``score``."""

    scores: list[Score]
    """In the order of the items."""


@dataclass(frozen=True, kw_only=True)
class RewardAnswer(Answer):
    """Answer of ``reward``."""

    rewards: list[Score]
    """In the order of the items."""


@dataclass(frozen=True, kw_only=True)
class RewardPairAnswer(Answer):
    """Answer of ``reward_pairs``."""

    rewards: list[RewardPair]
    """In the order of the pairs."""


@dataclass(frozen=True, kw_only=True)
class RerankAnswer(Answer):
    """Answer of ``rerank``."""

    results: list[Ranked]
    """Best first; candidates that can't be scored stand last."""
    best: Ranked
    pair: BestAgainstWorst | None = None
    """Where two candidates have different scores."""
    listwise: bool = False
    """Whether a score depends on the other candidates."""


@dataclass(frozen=True)
class Policy:
    """Which adapter the backbone carries, and which it could."""

    policy_version: str
    previous: str | None = None
    available: list[str] = field(default_factory=list)
    history: list[Mapping[str, Any]] = field(default_factory=list)
    """Newest last."""


@dataclass(frozen=True)
class HeadInfo:
    """A loaded head; ``version`` is the active one."""

    name: str
    kind: str
    version: int
    versions: list[int] = field(default_factory=list)
    sequence: int | None = None
    """Number of the last online step."""
    created: str | None = None
    backbone: Mapping[str, Any] = field(default_factory=dict)
    """Name, revision and fingerprint of the backbone that it was fitted on."""
    layers: list[int] = field(default_factory=list)
    position: str | None = None
    pool: Mapping[str, Any] | None = None
    """How the scores of a response's tokens make its score."""
    template: str | None = None
    calibration: Mapping[str, Any] = field(default_factory=dict)
    fit: Mapping[str, Any] = field(default_factory=dict)
    """Data hash, seed and metrics of the fit."""


@dataclass(frozen=True)
class Job:
    """A bulk job."""

    id: str
    state: str
    """``running``, ``done`` or ``cancelled``."""
    kind: str
    rows: int
    done: int
    """Rows that are worked off."""
    created: float | None = None
    """Unix time."""
    head: str | None = None
    scores: str | None = None
    """Name of the stream to which scored rows are appended as well."""


@dataclass(frozen=True)
class Health:
    """Whether requests are welcome."""

    ready: bool
    status: str
    """If they are not, why."""


def read(kind: type[T], value: Any) -> T:
    """A JSON value as ``kind``.

    Raises:
        UnreadableAnswer: a field without a default is missing, or an object is something else.
    """
    try:
        return _read(kind, value)  # type: ignore[no-any-return]
    except (TypeError, AttributeError) as error:
        raise UnreadableAnswer(f"the answer is not a {kind.__name__}: {error}") from None


def _read(kind: Any, value: Any) -> Any:
    if value is None:
        return None
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        return _read(next(arg for arg in get_args(kind) if arg is not type(None)), value)
    if origin is list:
        return [_read(get_args(kind)[0], element) for element in value]
    if isinstance(kind, type) and is_dataclass(kind):
        return kind(**{name: _read(inner, value[name]) for name, inner in _hints(kind) if name in value})
    return value


@cache
def _hints(kind: type[Any]) -> tuple[tuple[str, Any], ...]:
    hints = get_type_hints(kind)
    return tuple((f.name, hints[f.name]) for f in fields(kind))
