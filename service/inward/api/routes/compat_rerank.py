"""Rerank as Cohere, Jina, vLLM and text-embeddings-inference speak it: the query is the prompt, documents are its
responses.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from fastapi import APIRouter, Response

from inward.api.answers import plain
from inward.api.compat import as_cohere, as_documents, route_with_errors, score_candidates
from inward.api.errors import responses
from inward.api.services import FromApp, Services
from inward.wire.compat import DocumentsRequest, TextsRequest
from inward.wire.compat_answers import (
    ApiVersion,
    CohereError,
    DocumentsAnswer,
    DocumentsError,
    RankedDocument,
    RankedText,
    RerankMeta,
    RerankUsage,
    TextRank,
)

v1 = APIRouter(
    route_class=route_with_errors(lambda _: as_documents), responses=responses(DocumentsError), tags=["compatibility"]
)
v2 = APIRouter(
    route_class=route_with_errors(lambda _: as_cohere), responses=responses(CohereError), tags=["compatibility"]
)


@v1.post("/v1/rerank", response_model=DocumentsAnswer, summary="Rerank of Cohere's first API, Jina and vLLM")
async def rerank_v1(request: DocumentsRequest, services: FromApp) -> Response:
    """Documents come back with their texts, unless `return_documents` is false."""
    return await rank_documents(services, request, version="1")


@v2.post("/v2/rerank", response_model=DocumentsAnswer, summary="Rerank of Cohere's second API")
async def rerank_v2(request: DocumentsRequest, services: FromApp) -> Response:
    """Long documents are cut, as Cohere does."""
    return await rank_documents(services, request, version="2", truncate=True, texts=False)


async def rank_documents(
    services: Services, request: DocumentsRequest, *, version: str, truncate: bool = False, texts: bool = True
) -> Response:
    """Answers in the words that the three share.

    Args:
        truncate, texts: whether long documents are cut, and whether documents come back, where the request does not
        say.
    """
    documents = request.texts()
    cut = truncate or request.truncate_prompt_tokens is not None
    result = await score_candidates(services, request, request.query, documents, "documents", truncate=cut)
    shown = texts if request.return_documents is None else request.return_documents
    results = [
        RankedDocument(
            index=i, relevance_score=result.units_N[i], document=RankedText(text=documents[i]) if shown else None
        )
        for i in _best_first(result.scores_N)[: request.top_n or None]
    ]
    answer = DocumentsAnswer(
        id=f"rerank-{uuid.uuid4().hex}",
        model=services.model,
        usage=RerankUsage(prompt_tokens=result.tokens, total_tokens=result.tokens),
        meta=RerankMeta(api_version=ApiVersion(version=version)),
        results=results,
    )
    return plain(answer.model_dump(exclude_none=True), headers=result.headers())


async def rank_texts(services: Services, request: TextsRequest) -> Response:
    """Answers text-embeddings-inference's bare list."""
    result = await score_candidates(services, request, request.query, request.texts, "texts", truncate=False)
    scores = result.scores_N if request.raw_scores else result.units_N
    ranks = [
        TextRank(index=i, score=scores[i], text=request.texts[i] if request.return_text else None)
        for i in _best_first(result.scores_N)
    ]
    return plain([rank.model_dump(exclude_none=True) for rank in ranks], headers=result.headers())


def _best_first(scores_N: Sequence[float]) -> list[int]:
    """Places by score; equals in the order in which they came."""
    return sorted(range(len(scores_N)), key=lambda i: -scores_N[i])
