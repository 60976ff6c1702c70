"""``/margin``, ``/score``, ``/reward``, ``/rerank``: what a head says of texts.

``/score`` and ``/rerank`` are paths of other projects too: the fields present decide.
"""

from __future__ import annotations

from fastapi import APIRouter, Response

from inward.api import elements, scoring
from inward.api.answers import scored
from inward.api.compat import native_route
from inward.api.errors import OVER_QUOTA, RESPONSES, responses, told
from inward.api.events import EVENTS
from inward.api.ranking import rank
from inward.api.routes.compat_rerank import rank_documents, rank_texts
from inward.api.routes.compat_vllm import score_text_pairs
from inward.api.score_streams import append_pair, stream
from inward.api.services import FromApp
from inward.api.streamed_ranking import stream_ranking
from inward.wire import (
    MarginAnswer,
    MarginRequest,
    RerankAnswer,
    RewardAnswer,
    RewardPair,
    RewardRequest,
    Score,
    ScoreAnswer,
)
from inward.wire.compat import AnyRerank, AnyScore, DocumentsRequest, TextPairsRequest, TextsRequest
from inward.wire.compat_answers import DocumentsAnswer, DocumentsError, TextPairsAnswer, TextRank, TextsError, VllmError

CONFLICT = told({409: "`append_to` is set, and this server has no Redis to keep streams."})

router = APIRouter(route_class=native_route(), responses=RESPONSES | OVER_QUOTA, tags=["scoring"])


@router.post("/margin", response_model=MarginAnswer, summary="Margins of preference pairs")
async def margin(request: MarginRequest, services: FromApp) -> Response:
    """LEGEND's signed difference between chosen and rejected, with the hybrid head's confidence where one is loaded."""
    heads = elements.with_confidence(services, scoring.find_head(services, request.head, elements.MARGIN_KINDS))
    results = await scoring.score_all(services, "pairs", request.pairs, heads, request, pair=True)
    margins = [elements.margin(result, f"pairs.{i}") for i, result in enumerate(results.results)]
    return scored(MarginAnswer(**results.named(services), margins=margins), results.timing)


@router.post(
    "/score",
    response_model=ScoreAnswer | TextPairsAnswer,
    summary="Scores of responses",
    responses=responses(DocumentsError, VllmError),
)
async def score(request: AnyScore, services: FromApp) -> Response:
    """One number for each item; on request each layer's part of it and the score at every token of the response.

    With `text_1` and `text_2` (or `queries` and `documents`) it is vLLM's `/score`.
    """
    if isinstance(request, TextPairsRequest):
        return await score_text_pairs(services, request)
    head = scoring.find_head(services, request.head, elements.SCORE_KINDS)
    results = await scoring.score_all(
        services, "items", request.items, (head.name,), request, details=frozenset(request.detail)
    )
    scores = [elements.score(result, f"items.{i}", services.prompts.pieces) for i, result in enumerate(results.results)]
    return scored(ScoreAnswer(**results.named(services), scores=scores), results.timing)


@router.post("/reward", response_model=RewardAnswer, summary="Hybrid reward of responses or pairs")
async def reward(request: RewardRequest, services: FromApp) -> Response:
    """The hybrid reward and its calibrated probability; of pairs also the confidence that the label is right."""
    head = (scoring.find_head(services, request.head, elements.REWARD_KINDS).name,)
    details = frozenset(request.detail)
    rewards: list[Score] | list[RewardPair]
    if request.pairs is not None:
        results = await scoring.score_all(services, "pairs", request.pairs, head, request, details=details, pair=True)
        rewards = [elements.reward_pair(result, f"pairs.{i}") for i, result in enumerate(results.results)]
    else:
        results = await scoring.score_all(services, "items", request.items or [], head, request, details=details)
        rewards = [
            elements.score(result, f"items.{i}", services.prompts.pieces) for i, result in enumerate(results.results)
        ]
    return scored(RewardAnswer(**results.named(services), rewards=rewards), results.timing)


@router.post(
    "/rerank",
    response_model=RerankAnswer | DocumentsAnswer | list[TextRank],
    summary="Ranks candidate answers to one prompt",
    responses={**responses(DocumentsError, TextsError), **CONFLICT, 200: EVENTS},
)
async def rerank(request: AnyRerank, services: FromApp) -> Response:
    """Best first, and the best against the worst as a pair for DPO. With an `srr` head a score depends on the other
    candidates.

    With `stream` come server-sent events: `sample` for each answer as it is drawn and scored, or rejected, `result`
    with the answer, or `error`. With `documents` it is the rerank of Jina and vLLM, with `texts` that of
    text-embeddings-inference.
    """
    if isinstance(request, DocumentsRequest):
        return await rank_documents(services, request, version="1")
    if isinstance(request, TextsRequest):
        return await rank_texts(services, request)
    head = scoring.find_head(services, request.head or services.rerank_head, elements.RERANK_KINDS)
    rows = stream(services, request.append_to)
    if request.stream:
        return await stream_ranking(
            services, request, head, lambda answer: append_pair(rows, request.append_to, answer)
        )
    answer, timing = await rank(services, request, head)
    await append_pair(rows, request.append_to, answer)
    return scored(answer, timing)
