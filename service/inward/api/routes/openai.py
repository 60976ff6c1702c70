"""OpenAI's chat completions, completions and list of models: any of its clients draws the best of N."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Path, Response

from inward.api.answers import plain, timing_headers
from inward.api.body import JsonRoute
from inward.api.candidates import Candidates
from inward.api.drawing import best, draw, read_request, usage
from inward.api.errors import OVER_QUOTA, RESPONSES, only
from inward.api.events import EVENTS
from inward.api.services import FromApp, Services
from inward.api.streamed_drawing import stream
from inward.errors import NotFound
from inward.types import slowest
from inward.wire.openai import ChatRequest, CompletionRequest
from inward.wire.openai_answers import (
    ChatAnswer,
    ChatChoice,
    ChatMessage,
    CompletionAnswer,
    CompletionChoice,
    Model,
    ModelsAnswer,
    finish,
)

STARTED = int(time.time())
"""What OpenAI's clients take for the age of a model."""

router = APIRouter(route_class=JsonRoute, tags=["openai"])


@router.post(
    "/v1/chat/completions",
    response_model=ChatAnswer,
    summary="OpenAI's chat completions: the best of N",
    responses={**RESPONSES, **OVER_QUOTA, 200: EVENTS},
)
async def chat(request: ChatRequest, services: FromApp) -> Response:
    """Draws `best_of` answers and gives the `n` best by `head`, best first. A choice's field `inward` has its score.
    `usage` counts every answer that was drawn. Unknown fields are ignored; tools, log probabilities and images are
    refused by their name.

    With `stream` come server-sent events: one answer token by token while it is drawn; with `best_of` above 1 first
    chunks whose field `inward` tells the progress, then the winners whole.
    """
    wanted = await read_request(services, request)
    about = _about(services, "chatcmpl")
    if request.stream:
        return await stream(services, request, wanted, {**about, "object": "chat.completion.chunk"}, _delta)
    found = await draw(services, wanted)
    choices = [
        ChatChoice(
            index=i,
            message=ChatMessage(content=given.candidate.text),
            finish_reason=finish(given.candidate.finish_reason),
            inward=given.rating,
        )
        for i, given in enumerate(best(found[0], request.given))
    ]
    return _answer(ChatAnswer(**about, choices=choices, usage=usage(wanted, found)), found)


@router.post(
    "/v1/completions",
    response_model=CompletionAnswer,
    summary="OpenAI's completions: the best of N",
    responses={**RESPONSES, **OVER_QUOTA, 200: EVENTS},
)
async def complete(request: CompletionRequest, services: FromApp) -> Response:
    """As `/v1/chat/completions`, of text to which no chat template is applied."""
    wanted = await read_request(services, request)
    about = _about(services, "cmpl")
    if request.stream:
        return await stream(services, request, wanted, {**about, "object": "text_completion"}, _text)
    found = await draw(services, wanted)
    givens = [given for one in found for given in best(one, request.given)]
    choices = [
        CompletionChoice(
            index=i,
            text=given.candidate.text,
            finish_reason=finish(given.candidate.finish_reason),
            inward=given.rating,
        )
        for i, given in enumerate(givens)
    ]
    return _answer(CompletionAnswer(**about, choices=choices, usage=usage(wanted, found)), found)


@router.get(
    "/v1/models",
    response_model=ModelsAnswer,
    summary="What a request may name as its model",
    responses=only(401, 503),
)
async def models(services: FromApp) -> Response:
    """The backbone, the versions of its policy, and the heads. A head as `model` is the one that ranks."""
    return plain(ModelsAnswer(data=await _models(services)).model_dump())


@router.get(
    "/v1/models/{name:path}",
    response_model=Model,
    summary="One of the models",
    responses=only(401, 404, 422, 503),
)
async def model(
    name: Annotated[str, Path(max_length=256, description="A name that `GET /v1/models` lists.")], services: FromApp
) -> Response:
    """One of what `GET /v1/models` lists."""
    found = next((one for one in await _models(services) if one.id == name), None)
    if found is None:
        raise NotFound("there is no such model; GET /v1/models lists them", param="name")
    return plain(found.model_dump())


async def _models(services: Services) -> list[Model]:
    policy = await services.policies.show()
    active = policy["policy_version"]
    backbone = Model(id=services.model, created=STARTED, inward={"kind": "backbone", "policy_version": active})
    policies = [
        Model(id=version, created=STARTED, inward={"kind": "policy", "active": version == active})
        for version in policy["available"]
    ]
    heads = [
        Model(
            id=row["name"],
            created=STARTED,
            inward={"kind": "head", "head_kind": row["kind"], "version": row["version"]},
        )
        for row in services.heads.listing()
    ]
    return [backbone, *policies, *heads]


def _about(services: Services, prefix: str) -> dict[str, Any]:
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": services.model}


def _answer(answer: ChatAnswer | CompletionAnswer, found: Sequence[Candidates]) -> Response:
    return plain(answer.model_dump(), headers=timing_headers(slowest(one.scored for one in found)))


def _delta(index: int, text: str | None, ended: str | None, *, begun: bool = False) -> dict[str, Any]:
    role = {} if begun else {"role": "assistant"}
    delta = {} if text is None else {**role, "content": text}
    return {"index": index, "delta": delta, "finish_reason": ended}


def _text(index: int, text: str | None, ended: str | None, *, begun: bool = False) -> dict[str, Any]:
    return {"index": index, "text": text or "", "finish_reason": ended, "logprobs": None}
