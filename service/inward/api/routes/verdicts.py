"""Heads as judges in the formats of others: OpenAI's moderation and decisions, LiteLLM's guardrail."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from fastapi import APIRouter, Response

from inward.api.answers import plain, timing_headers
from inward.api.body import JsonRoute
from inward.api.compat import Conversation
from inward.api.decisions import decide
from inward.api.errors import OVER_QUOTA, RESPONSES
from inward.api.scoring import is_head
from inward.api.services import FromApp, Services
from inward.api.verdicts import Judge, badness, judge, judged, judges, raw
from inward.errors import InvalidField
from inward.types import Scored, slowest
from inward.wire.compat import conversation
from inward.wire.verdicts import (
    DecisionAnswer,
    DecisionRequest,
    DecisionUsage,
    GuardrailAnswer,
    GuardrailParams,
    GuardrailRequest,
    InputDetails,
    Moderation,
    ModerationAnswer,
    ModerationRequest,
)

router = APIRouter(route_class=JsonRoute, responses=RESPONSES | OVER_QUOTA, tags=["verdicts"])


@router.post("/v1/moderations", response_model=ModerationAnswer, summary="OpenAI's moderation: a category a head")
async def moderate(request: ModerationRequest, services: FromApp) -> Response:
    """Each head that knows how acceptable texts are scored is a category, and flags what lies below its threshold. The
    threshold is set by the share of acceptable texts that it flags by mistake: `false_positives`, else the setting
    `INWARD_FALSE_POSITIVES`.
    """
    prompt = conversation(request.prompt or "", "prompt")
    conversations = [Conversation(prompt, text) for text in request.texts()]
    asked, scored = await judged(services, conversations, lambda: _moderators(services, request), "input")
    answer = ModerationAnswer(
        id=f"modr-{uuid.uuid4().hex}", model=services.model, results=[_moderation(asked, one) for one in scored]
    )
    return plain(answer.model_dump(), headers=_timing(scored))


@router.post("/v1/decisions", response_model=DecisionAnswer, summary="OpenAI's decisions: questions for heads")
async def decisions(request: DecisionRequest, services: FromApp) -> Response:
    """`predicate`: the calibrated probability that the input is acceptable, by the head that `name` names. `score`: the
    expected level, where levels hold equal shares of the head's calibration set. `choice`: softmax over the choices, by
    a ranker. A refusal where no head knows what is asked, or isn't calibrated for it.
    """
    answers, used = await decide(services, request)
    read = used.prompt_tokens + used.completion_tokens
    usage = DecisionUsage(
        input_tokens=read, input_tokens_details=InputDetails(cached_tokens=used.cached_tokens), total_tokens=read
    )
    return plain(DecisionAnswer(model=services.model, answers=answers, usage=usage).model_dump())


@router.post("/beta/litellm_basic_guardrail_api", response_model=GuardrailAnswer, summary="LiteLLM's guardrail")
async def guard(request: GuardrailRequest, services: FromApp) -> Response:
    """Blocks texts that the head scores below its threshold. What can't be read (images, tool calls, a text that is too
    long) is an error, by which LiteLLM blocks, too.
    """
    params = request.additional_provider_specific_params or GuardrailParams()
    if field := request.unread():
        raise InvalidField(f"{field} can't be judged by a head of texts; `text_only` lets them pass", param=field)
    context = request.context()
    conversations = [Conversation(context, text) for text in request.texts or [] if text.strip()]

    def named() -> list[Judge]:
        return [judge(services, params.head or services.guard_head, params.false_positives)]

    (one,), scored = await judged(services, conversations, named, "texts") if conversations else (named(), [])
    lowest = min((raw(text, 0) for text in scored), default=one.threshold)
    blocked = lowest < one.threshold
    answer = GuardrailAnswer(
        action="BLOCKED" if blocked else "NONE", blocked_reason=one.reason(lowest) if blocked else None
    )
    return plain(answer.model_dump(), headers=_timing(scored))


def _moderators(services: Services, request: ModerationRequest) -> list[Judge]:
    if request.head is not None:
        return [judge(services, request.head, request.false_positives)]
    if request.model is not None and is_head(services, request.model):
        return [judge(services, request.model, request.false_positives, param="model")]
    return judges(services, request.false_positives)


def _moderation(asked: Sequence[Judge], scored: Scored) -> Moderation:
    scores = {one.ref.name: raw(scored, i) for i, one in enumerate(asked)}
    flags = {one.ref.name: scores[one.ref.name] < one.threshold for one in asked}
    return Moderation(
        flagged=any(flags.values()),
        categories=flags,
        category_scores={one.ref.name: badness(scored, i) for i, one in enumerate(asked)},
        category_applied_input_types={name: ["text"] for name in flags},
        inward={one.ref.name: one.verdict(scores[one.ref.name]) for one in asked},
    )


def _timing(scored: Sequence[Scored]) -> dict[str, str]:
    return timing_headers(slowest(scored)) if scored else {}
