"""vLLM's ``/classify`` (as verl reads it) and ``/score``."""

from __future__ import annotations

import time
import uuid

from fastapi import APIRouter, Response

from inward.api.answers import plain
from inward.api.compat import (
    POINTWISE,
    CompatScores,
    Conversation,
    as_vllm,
    route_with_errors,
    score_candidates,
    score_conversations,
)
from inward.api.errors import responses
from inward.api.services import FromApp, Services
from inward.errors import InvalidField
from inward.wire.compat import ClassifyRequest, TextPairsRequest
from inward.wire.compat_answers import (
    Classified,
    ClassifyAnswer,
    PoolingUsage,
    TextPairsAnswer,
    TextPairScore,
    VllmError,
)

router = APIRouter(
    route_class=route_with_errors(lambda _: as_vllm), responses=responses(VllmError), tags=["compatibility"]
)


@router.post("/classify", response_model=ClassifyAnswer, summary="vLLM's classification, as verl calls it")
async def classify(request: ClassifyRequest, services: FromApp) -> Response:
    """Inputs are whole conversations with the chat template applied. `use_activation: false` gives the raw score."""
    inputs = [request.input] if isinstance(request.input, str) else request.input
    conversations = [Conversation(*services.prompts.turns.split(text), rendered=True) for text in inputs]
    result = await score_conversations(services, request, "input", conversations, truncate=False)
    scores = result.scores_N if request.use_activation is False else result.units_N
    head = result.scored[0].heads[0].name
    answer = ClassifyAnswer(
        id=f"classify-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=services.model,
        data=[Classified(index=i, label=head, probs=[score]) for i, score in enumerate(scores)],
        usage=_usage(result),
    )
    return plain(answer.model_dump(), headers=result.headers())


@router.post("/v1/score", response_model=TextPairsAnswer, summary="vLLM's scores of text pairs")
async def score(request: TextPairsRequest, services: FromApp) -> Response:
    """`text_1` (or `queries`) are prompts, `text_2` (or `documents`) their responses: one with each, or the n-th
    with the n-th.
    """
    return await score_text_pairs(services, request)


async def score_text_pairs(services: Services, request: TextPairsRequest) -> Response:
    """Answers as vLLM does.

    Raises:
        InvalidField: texts are missing, or their numbers do not fit.
    """
    first, second = _list(request.text_1, request.queries, "text_1"), _list(request.text_2, request.documents, "text_2")
    cut = request.truncate_prompt_tokens is not None
    if len(first) == 1 < len(second):
        result = await score_candidates(services, request, first[0], second, "text_2", truncate=cut, kinds=POINTWISE)
    elif len(first) == len(second):
        conversations = [Conversation(prompt, response) for prompt, response in zip(first, second, strict=True)]
        result = await score_conversations(services, request, "text_2", conversations, truncate=cut)
    else:
        raise InvalidField(
            f"text_1 has {len(first)} texts and text_2 has {len(second)}; give one, or as many", param="text_1"
        )
    scores = result.scores_N if request.use_activation is False else result.units_N
    answer = TextPairsAnswer(
        id=f"score-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=services.model,
        data=[TextPairScore(index=i, score=score) for i, score in enumerate(scores)],
        usage=_usage(result),
    )
    return plain(answer.model_dump(), headers=result.headers())


def _list(given: str | list[str] | None, other: str | list[str] | None, name: str) -> list[str]:
    texts = other if given is None else given
    if texts is None:
        raise InvalidField(f"{name} is missing", param=name)
    return [texts] if isinstance(texts, str) else texts


def _usage(result: CompatScores) -> PoolingUsage:
    return PoolingUsage(prompt_tokens=result.tokens, total_tokens=result.tokens)
