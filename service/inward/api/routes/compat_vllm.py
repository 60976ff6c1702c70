"""vLLM's ``/classify`` (as verl reads it) and ``/score``."""

from __future__ import annotations

import time
import uuid

from fastapi import APIRouter, Response

from inward.api.answers import plain
from inward.api.compat import POINTWISE, CompatScore, Whole, as_vllm, family_route, judge, judge_candidates
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

router = APIRouter(route_class=family_route(lambda _: as_vllm), responses=responses(VllmError), tags=["compatibility"])


@router.post("/classify", response_model=ClassifyAnswer, summary="vLLM's classification, as verl calls it")
async def classify(request: ClassifyRequest, services: FromApp) -> Response:
    """Inputs are whole conversations with the chat template applied. `use_activation: false` gives the raw score."""
    inputs = [request.input] if isinstance(request.input, str) else request.input
    wholes = [Whole(*services.prompts.turns.split(text), rendered=True) for text in inputs]
    judged = await judge(services, request, "input", wholes, truncate=False)
    scores = judged.scores_N if request.use_activation is False else judged.units_N
    head = judged.scored[0].heads[0].name
    answer = ClassifyAnswer(
        id=f"classify-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=services.info()["model"],
        data=[Classified(index=i, label=head, probs=[score]) for i, score in enumerate(scores)],
        usage=_usage(judged),
    )
    return plain(answer.model_dump(), headers=judged.headers())


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
        judged = await judge_candidates(services, request, POINTWISE, first[0], second, "text_2", truncate=cut)
    elif len(first) == len(second):
        wholes = [Whole(prompt, response) for prompt, response in zip(first, second, strict=True)]
        judged = await judge(services, request, "text_2", wholes, truncate=cut)
    else:
        raise InvalidField(
            f"text_1 has {len(first)} texts and text_2 has {len(second)}; give one, or as many", param="text_1"
        )
    scores = judged.scores_N if request.use_activation is False else judged.units_N
    answer = TextPairsAnswer(
        id=f"score-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=services.info()["model"],
        data=[TextPairScore(index=i, score=score) for i, score in enumerate(scores)],
        usage=_usage(judged),
    )
    return plain(answer.model_dump(), headers=judged.headers())


def _list(given: str | list[str] | None, other: str | list[str] | None, name: str) -> list[str]:
    texts = other if given is None else given
    if texts is None:
        raise InvalidField(f"{name} is missing", param=name)
    return [texts] if isinstance(texts, str) else texts


def _usage(judged: CompatScore) -> PoolingUsage:
    return PoolingUsage(prompt_tokens=judged.tokens, total_tokens=judged.tokens)
