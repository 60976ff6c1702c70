"""Answers in other projects' words; see ``wire.compat`` for what they ask."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from inward.wire.base import Wire


class OpenRLHFAnswer(Wire):
    """OpenRLHF's; numbers only, because it makes tensors of all of them."""

    rewards: list[float]
    """Raw scores."""
    scores: list[float]
    """The same in [0, 1], for its dynamic filtering."""
    extra_logs: dict[str, list[float]]
    """`probability`, and `truncated` (0 or 1)."""


class LlamaFactoryAnswer(Wire):
    """LLaMA-Factory's."""

    id: str
    object: Literal["reward.scores"] = "reward.scores"
    model: str
    scores: list[float]
    """Raw scores."""


class VerifyAnswer(BaseModel):
    """NeMo Gym's: the request and the reward."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    responses_create_params: dict[str, Any]
    response: dict[str, Any]
    reward: float
    """Raw score."""


class PoolingUsage(Wire):
    """Tokens, as vLLM counts them for models that generate nothing."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0


class Classified(Wire):
    """One text's score."""

    index: int
    label: str
    probs: list[float]
    num_classes: int = 1


class ClassifyAnswer(Wire):
    """vLLM's `/classify`."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Classified]
    usage: PoolingUsage


class TextPairScore(Wire):
    """One pair's score."""

    index: int
    object: Literal["score"] = "score"
    score: float


class TextPairsAnswer(Wire):
    """vLLM's `/score`."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[TextPairScore]
    usage: PoolingUsage


class RankedText(Wire):
    """A document's text."""

    text: str


class RankedDocument(Wire):
    """One document in its place."""

    index: int
    document: RankedText | None = None
    relevance_score: float
    """In [0, 1]."""


class RerankUsage(Wire):
    """Tokens."""

    prompt_tokens: int
    total_tokens: int


class ApiVersion(Wire):
    """Of Cohere's API."""

    version: str


class BilledUnits(Wire):
    """Nobody is billed; Cohere's clients expect the number."""

    search_units: int = 1


class RerankMeta(Wire):
    """Cohere's."""

    api_version: ApiVersion
    billed_units: BilledUnits = BilledUnits()


class DocumentsAnswer(Wire):
    """What Cohere, Jina and vLLM answer to a rerank; each of their clients finds its fields."""

    id: str
    object: Literal["list"] = "list"
    model: str
    usage: RerankUsage
    meta: RerankMeta
    results: list[RankedDocument]
    """Best first."""


class TextRank(Wire):
    """text-embeddings-inference's: one text in its place."""

    index: int
    score: float
    text: str | None = None


class VllmErrorDetail(Wire):
    """What went wrong; `code` is the status."""

    message: str
    type: str
    param: str | None
    code: int


class VllmError(Wire):
    """vLLM's error body, and OpenAI's."""

    error: VllmErrorDetail


class CohereError(Wire):
    """Cohere's error body."""

    message: str


class DocumentsError(Wire):
    """Of paths that Cohere (`message`), Jina (`detail`) and vLLM (`error`) share."""

    message: str
    detail: str
    error: VllmErrorDetail


class TextsError(Wire):
    """text-embeddings-inference's error body."""

    error: str
    error_type: Literal["Validation", "Overloaded", "Unhealthy", "Backend"]


class GymError(Wire):
    """NeMo Gym's error body."""

    detail: str
