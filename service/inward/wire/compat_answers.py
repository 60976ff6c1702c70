"""Answers in other projects' words; see ``wire.compat`` for what they ask."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class CompatAnswer(BaseModel):
    """Base of all: descriptions from docstrings."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class OpenRLHFAnswer(CompatAnswer):
    """OpenRLHF's; numbers only, because it makes tensors of all of them."""

    rewards: list[float]
    """Raw scores."""
    scores: list[float]
    """The same in [0, 1], for its dynamic filtering."""
    extra_logs: dict[str, list[float]]
    """`probability`, and `truncated` (0 or 1)."""


class LlamaFactoryAnswer(CompatAnswer):
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


class PoolingUsage(CompatAnswer):
    """Tokens, as vLLM counts them for models that generate nothing."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0


class Classified(CompatAnswer):
    """One text's score."""

    index: int
    label: str
    probs: list[float]
    num_classes: int = 1


class ClassifyAnswer(CompatAnswer):
    """vLLM's `/classify`."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Classified]
    usage: PoolingUsage


class TextPairScore(CompatAnswer):
    """One pair's score."""

    index: int
    object: Literal["score"] = "score"
    score: float


class TextPairsAnswer(CompatAnswer):
    """vLLM's `/score`."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[TextPairScore]
    usage: PoolingUsage


class RankedText(CompatAnswer):
    """A document's text."""

    text: str


class RankedDocument(CompatAnswer):
    """One document in its place."""

    index: int
    document: RankedText | None = None
    relevance_score: float
    """In [0, 1]."""


class RerankUsage(CompatAnswer):
    """Tokens."""

    prompt_tokens: int
    total_tokens: int


class ApiVersion(CompatAnswer):
    """Of Cohere's API."""

    version: str


class BilledUnits(CompatAnswer):
    """Nobody is billed; Cohere's clients expect the number."""

    search_units: int = 1


class RerankMeta(CompatAnswer):
    """Cohere's."""

    api_version: ApiVersion
    billed_units: BilledUnits = BilledUnits()


class DocumentsAnswer(CompatAnswer):
    """What Cohere, Jina and vLLM answer to a rerank; each of their clients finds its fields."""

    id: str
    object: Literal["list"] = "list"
    model: str
    usage: RerankUsage
    meta: RerankMeta
    results: list[RankedDocument]
    """Best first."""


class TextRank(CompatAnswer):
    """text-embeddings-inference's: one text in its place."""

    index: int
    score: float
    text: str | None = None


class VllmErrorDetail(CompatAnswer):
    """What went wrong; `code` is the status."""

    message: str
    type: str
    param: str | None
    code: int


class VllmError(CompatAnswer):
    """vLLM's error body, and OpenAI's."""

    error: VllmErrorDetail


class CohereError(CompatAnswer):
    """Cohere's error body."""

    message: str


class DocumentsError(CompatAnswer):
    """Of paths that Cohere (`message`), Jina (`detail`) and vLLM (`error`) share."""

    message: str
    detail: str
    error: VllmErrorDetail


class TextsError(CompatAnswer):
    """text-embeddings-inference's error body."""

    error: str
    error_type: Literal["Validation", "Overloaded", "Unhealthy", "Backend"]


class GymError(CompatAnswer):
    """NeMo Gym's error body."""

    detail: str
