"""Answers that OpenAI's clients ask for: drawn, read by a head, and the best of them given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from inward.api.candidates import Candidate, Candidates, Generation, to_draw, watched
from inward.api.compat import requested_head
from inward.api.elements import RERANK_KINDS
from inward.api.scoring import Deadline, is_head, score_groups
from inward.api.services import Services
from inward.errors import InwardError, NotFound, TooLarge
from inward.prompts import Texts
from inward.types import Group, HeadRef
from inward.wire import NamedHead
from inward.wire.compat import conversation
from inward.wire.openai import ChatRequest, CompletionRequest, DrawRequest
from inward.wire.openai_answers import DrawUsage, Rating


@dataclass(frozen=True, slots=True)
class ToDraw:
    """What is to be drawn for one request: one list of answers for each of its prompts."""

    head: HeadRef
    generations: tuple[Generation, ...]
    deadline: Deadline


@dataclass(frozen=True, slots=True)
class Given:
    """One answer that is given."""

    candidate: Candidate
    rating: Rating


async def read_request(services: Services, request: ChatRequest | CompletionRequest) -> ToDraw:
    """What a request asks for.

    Raises:
        InwardError: names what of it can't be done.
    """
    prompts = _prompts(request)
    if (lists := len(prompts)) * request.drawn > (most := services.limits.candidates):
        raise TooLarge(
            f"{lists} prompts with {request.drawn} answers each are too many: one request may draw {most} answers",
            param="n" if request.best_of is None else "best_of",
        )
    await _check_model(services, request.model)
    head = requested_head(services, request, RERANK_KINDS, services.rerank_head)
    deadline = Deadline(request.timeout, services.limits.timeout_s)
    generations = [await _generation(services, request, texts, field, head.name) for texts, field in prompts]
    return ToDraw(head, tuple(generations), deadline)


async def draw(services: Services, wanted: ToDraw) -> list[Candidates]:
    """Draws all answers, one list for each prompt.

    Raises:
        InwardError: one of the lists could not be drawn, or the service could not do its part.
    """
    groups = [Group(one.prompt_ids, sampling=one.spec) for one in wanted.generations]
    outcomes = await score_groups(services, groups, (wanted.head.name,), wanted.deadline)
    found = []
    for generation, outcome in zip(wanted.generations, outcomes, strict=True):
        if isinstance(outcome, InwardError):
            raise outcome
        found.append(generation.found(outcome))
    return found


def best(found: Candidates, n: int) -> list[Given]:
    """The ``n`` best answers, best first."""
    return [_given(found, i) for i in found.order[:n]]


def _given(found: Candidates, i: int) -> Given:
    answer = found.answers[i]
    rating = Rating(
        score=answer.score,
        probability=answer.probability,
        share=answer.share,
        drawn=i,
        of=len(found.answers),
        finish_reason=answer.finish_reason or "stop",
        head=NamedHead.of(found.scored.heads[0]),
        policy_version=found.scored.policy_version,
    )
    return Given(answer, rating)


def usage(wanted: ToDraw, found: Sequence[Candidates]) -> DrawUsage:
    """Of all that was drawn."""
    return DrawUsage.of([one.prompt_ids for one in wanted.generations], [one.scored.usage for one in found])


def _prompts(request: ChatRequest | CompletionRequest) -> list[tuple[Texts, str]]:
    """The prompts, and the fields that they came in."""
    cut = bool(request.truncate)
    if isinstance(request, ChatRequest):
        return [(Texts(conversation(request.messages, "messages"), (), cut), "messages")]
    fields = ["prompt"] if isinstance(request.prompt, str) else [f"prompt.{i}" for i in range(len(request.prompt))]
    return [(Texts(text, (), cut, rendered=True), field) for text, field in zip(request.prompts(), fields, strict=True)]


async def _generation(services: Services, request: DrawRequest, texts: Texts, field: str, head: str) -> Generation:
    try:
        wanted = await to_draw(services, texts, field, request.drawn, request.sampling())
    except InwardError as error:
        if error.param != "sampling.max_tokens":
            raise
        raise error.at(request.budget_field) from None
    return replace(wanted, spec=watched(services, wanted.spec, head, request.early_rejection, request.stop_when))


async def _check_model(services: Services, name: str | None) -> None:
    """Lets pass the backbone, heads, the policy that is carried, and names of no meaning here, such as another
    service's model.

    Raises:
        NotFound: it is a policy that isn't carried now, so that the answer would be another one's.
    """
    if name is None or name == services.model or is_head(services, name):
        return
    policy = await services.policies.show()
    if name in policy["available"] and name != policy["policy_version"]:
        raise NotFound(
            f"the backbone carries the policy {policy['policy_version']!r} now and not {name!r}; POST /policy switches",
            param="model",
        )
