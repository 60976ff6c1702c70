"""Routes of RLHF trainers: OpenRLHF, slime and miles, LLaMA-Factory, NeMo Gym. Text that is too long is cut, as
their own servers do.
"""

from __future__ import annotations

import uuid
from typing import Any

from fastapi import APIRouter, Response

from inward.api.answers import plain
from inward.api.compat import CompatScore, Whole, as_fastapi, as_inward, family_route, judge
from inward.api.errors import RESPONSES, responses
from inward.api.services import FromApp
from inward.errors import InvalidField
from inward.wire.compat import Foreign, LlamaFactoryRequest, OpenRLHFRequest, SlimeRequest, VerifyRequest
from inward.wire.compat_answers import GymError, LlamaFactoryAnswer, OpenRLHFAnswer, VerifyAnswer

router = APIRouter(route_class=family_route(lambda _: as_inward), responses=RESPONSES, tags=["compatibility"])
gym = APIRouter(route_class=family_route(lambda _: as_fastapi), responses=responses(GymError), tags=["compatibility"])


@router.post("/get_reward", response_model=OpenRLHFAnswer, summary="OpenRLHF's remote reward model")
async def get_reward(request: OpenRLHFRequest, services: FromApp) -> Response:
    """Queries are whole conversations, decoded with special tokens; they are tokenised as they are."""
    prompts = request.prompts or []
    if prompts and len(prompts) != len(request.query):
        raise InvalidField(f"prompts has {len(prompts)} elements and query has {len(request.query)}", param="prompts")
    asked = [(query, prompts[i] if prompts else "") for i, query in enumerate(request.query)]
    wholes = [Whole(*services.prompts.split(query, prompt), rendered=True) for query, prompt in asked]
    judged = await judge(services, request, "query", wholes, truncate=True)
    logs = {"probability": list(judged.units_N), "truncated": [float(cut) for cut in judged.truncated_N]}
    answer = OpenRLHFAnswer(rewards=list(judged.scores_N), scores=list(judged.units_N), extra_logs=logs)
    return plain(answer.model_dump(), headers=judged.headers())


@router.post("/slime", response_model=float, summary="slime's and miles' remote reward model")
async def slime(request: SlimeRequest, services: FromApp) -> Response:
    """The answer is the bare number. A prompt in text counts as rendered if it ends as the chat template ends one."""
    prompt: Any = (
        request.prompt if isinstance(request.prompt, str) else [_message(m, i) for i, m in enumerate(request.prompt)]
    )
    rendered = isinstance(prompt, str) and services.prompts.is_rendered(prompt)
    judged = await judge(
        services, request, "prompt", [Whole(prompt, services.prompts.strip(request.response), rendered)], truncate=True
    )
    return plain(judged.scores_N[0], headers=judged.headers())


@router.post("/llama-factory", response_model=LlamaFactoryAnswer, summary="LLaMA-Factory's reward model server")
async def llama_factory(request: LlamaFactoryRequest, services: FromApp) -> Response:
    """Messages are whole conversations, decoded with special tokens; they are tokenised as they are."""
    wholes = [Whole(*services.prompts.split(text), rendered=True) for text in request.messages]
    judged = await judge(services, request, "messages", wholes, truncate=True)
    answer = LlamaFactoryAnswer(
        id=f"reward-{uuid.uuid4().hex}", model=services.info()["model"], scores=list(judged.scores_N)
    )
    return plain(answer.model_dump(), headers=judged.headers())


@gym.post("/seed_session", summary="NeMo Gym's begin of a rollout", response_model=dict[str, Any])
async def seed_session() -> Response:
    """Nothing is kept between calls."""
    return plain({})


@gym.post("/verify", response_model=VerifyAnswer, summary="NeMo Gym's verification of a rollout")
async def verify(request: VerifyRequest, services: FromApp) -> Response:
    """The last message of the assistant is scored, after all messages before it. The request comes back with
    `reward`.
    """
    judged = await _verified(request, services)
    return plain({**request.model_dump(), "reward": judged.scores_N[0]}, headers=judged.headers())


async def _verified(request: VerifyRequest, services: FromApp) -> CompatScore:
    params = request.responses_create_params
    turns = [
        *_turns(params.get("input"), "responses_create_params.input"),
        *_turns(request.response.get("output"), "response.output"),
    ]
    if not turns or turns[-1]["role"] != "assistant":
        raise InvalidField("the response ends without a message of the assistant", param="response.output")
    if instructions := params.get("instructions"):
        turns.insert(0, {"role": "system", "content": str(instructions)})
    named = Foreign(head=params.get("model")) if _is_head(services, params.get("model")) else Foreign()
    *before, last = turns
    return await judge(
        services, named, "response", [Whole(before, services.prompts.strip(last["content"]))], truncate=True
    )


def _turns(items: Any, where: str) -> list[dict[str, str]]:
    """Messages among the items of the Responses API; tool calls and reasoning are none."""
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    if not isinstance(items, list):
        raise InvalidField(f"{where} must be a string or a list of items", param=where)
    messages = [item for item in items if isinstance(item, dict) and item.get("type", "message") == "message"]
    return [_message(message, i) for i, message in enumerate(messages)]


def _message(message: dict[str, Any], index: int) -> dict[str, str]:
    content = message.get("content")
    if isinstance(content, list):  # parts of text, beside images and the like
        content = "".join(
            part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)
        )
    if not isinstance(message.get("role"), str) or not isinstance(content, str):
        raise InvalidField(f"message {index} needs a role and a content of text", param="messages")
    return {"role": message["role"], "content": content}


def _is_head(services: FromApp, name: Any) -> bool:
    return isinstance(name, str) and any(head["name"] == name for head in services.heads.listing())
