"""Routes of RLHF trainers: OpenRLHF, slime and miles, LLaMA-Factory, NeMo Gym. Text that is too long is cut, as
their own servers do.
"""

from __future__ import annotations

import uuid
from typing import Any

from fastapi import APIRouter, Response

from inward.api.answers import plain
from inward.api.compat import CompatScores, Conversation, as_fastapi, as_inward, route_with_errors, score_conversations
from inward.api.errors import RESPONSES, responses
from inward.api.scoring import is_head
from inward.api.services import FromApp
from inward.errors import InvalidField
from inward.wire.compat import (
    CompatRequest,
    LlamaFactoryRequest,
    OpenRLHFRequest,
    SlimeRequest,
    VerifyRequest,
    conversation,
    message,
    text_of,
)
from inward.wire.compat_answers import GymError, LlamaFactoryAnswer, OpenRLHFAnswer, VerifyAnswer

router = APIRouter(route_class=route_with_errors(lambda _: as_inward), responses=RESPONSES, tags=["compatibility"])
gym = APIRouter(
    route_class=route_with_errors(lambda _: as_fastapi), responses=responses(GymError), tags=["compatibility"]
)


@router.post("/get_reward", response_model=OpenRLHFAnswer, summary="OpenRLHF's remote reward model")
async def get_reward(request: OpenRLHFRequest, services: FromApp) -> Response:
    """Queries are whole conversations, decoded with special tokens; they are tokenised as they are."""
    prompts = request.prompts or []
    if prompts and len(prompts) != len(request.query):
        raise InvalidField(f"prompts has {len(prompts)} elements and query has {len(request.query)}", param="prompts")
    asked = [(query, prompts[i] if prompts else "") for i, query in enumerate(request.query)]
    conversations = [
        Conversation(*services.prompts.turns.split(query, prompt), rendered=True) for query, prompt in asked
    ]
    result = await score_conversations(services, request, "query", conversations, truncate=True)
    logs = {"probability": list(result.units_N), "truncated": [float(cut) for cut in result.truncated_N]}
    answer = OpenRLHFAnswer(rewards=list(result.scores_N), scores=list(result.units_N), extra_logs=logs)
    return plain(answer.model_dump(), headers=result.headers())


@router.post("/slime", response_model=float, summary="slime's and miles' remote reward model")
async def slime(request: SlimeRequest, services: FromApp) -> Response:
    """The answer is the bare number. A prompt in text counts as rendered if the chat template's turns are in it."""
    prompt, turns = request.prompt, services.prompts.turns
    if isinstance(prompt, str) and turns.is_rendered(prompt):
        sample = Conversation(*turns.split(prompt + request.response, prompt), rendered=True)
    else:
        sample = Conversation(conversation(prompt, "prompt"), turns.strip(request.response))
    result = await score_conversations(services, request, "prompt", [sample], truncate=True)
    return plain(result.scores_N[0], headers=result.headers())


@router.post("/llama-factory", response_model=LlamaFactoryAnswer, summary="LLaMA-Factory's reward model server")
async def llama_factory(request: LlamaFactoryRequest, services: FromApp) -> Response:
    """Messages are whole conversations, decoded with special tokens; they are tokenised as they are."""
    conversations = [Conversation(*services.prompts.turns.split(text), rendered=True) for text in request.messages]
    result = await score_conversations(services, request, "messages", conversations, truncate=True)
    answer = LlamaFactoryAnswer(id=f"reward-{uuid.uuid4().hex}", model=services.model, scores=list(result.scores_N))
    return plain(answer.model_dump(), headers=result.headers())


@gym.post("/seed_session", summary="NeMo Gym's begin of a rollout", response_model=dict[str, Any])
async def seed_session() -> Response:
    """Nothing is kept between calls."""
    return plain({})


@gym.post("/verify", response_model=VerifyAnswer, summary="NeMo Gym's verification of a rollout")
async def verify(request: VerifyRequest, services: FromApp) -> Response:
    """The last message of the assistant is scored, after all messages before it; a refusal is what it says. Tool calls
    and images, which are no text, are refused. The request comes back with `reward`.
    """
    result = await _verified(request, services)
    return plain({**request.model_dump(), "reward": result.scores_N[0]}, headers=result.headers())


async def _verified(request: VerifyRequest, services: FromApp) -> CompatScores:
    params = request.responses_create_params
    turns = [
        *_turns(params.get("input"), "responses_create_params.input"),
        *_turns(request.response.get("output"), "response.output"),
    ]
    if not turns or turns[-1]["role"] != "assistant":
        raise InvalidField("the response ends without a message of the assistant", param="response.output")
    if instructions := params.get("instructions"):
        turns.insert(0, {"role": "system", "content": str(instructions)})
    model = params.get("model")
    named = CompatRequest(head=model if isinstance(model, str) and is_head(services, model) else None)
    *before, last = turns
    rollout = Conversation(before, services.prompts.turns.strip(last["content"]))
    return await score_conversations(services, named, "response", [rollout], truncate=True)


def _turns(items: Any, where: str) -> list[dict[str, str]]:
    """The messages and tool results among items of the Responses API; reasoning is no part of a conversation.

    Raises:
        InvalidField: names an item that is none of these, such as a tool call.
    """
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    if not isinstance(items, list):
        raise InvalidField(f"{where} must be a string or a list of items", param=where)
    turns: list[dict[str, str]] = []
    for i, item in enumerate(items):
        kind = item.get("type", "message") if isinstance(item, dict) else type(item).__name__
        if kind == "message":
            turns.append(message(item, f"{where}.{i}"))
        elif kind == "function_call_output":
            turns.append({"role": "tool", "content": text_of(item.get("output"), f"{where}.{i}.output")})
        elif kind != "reasoning":
            raise InvalidField(f"{where}.{i} is a {kind!r}, which is no text and can't be scored", param=f"{where}.{i}")
    return turns
