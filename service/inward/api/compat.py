"""What other projects' routes share: which head answers, whole conversations as prompt and response, scores in [0,
1], error bodies.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError

from inward.api.answers import plain, refusal, timing_headers
from inward.api.body import JsonRoute
from inward.api.candidates import candidates
from inward.api.elements import RERANK_KINDS
from inward.api.errors import explain
from inward.api.scoring import Deadline, find_head, is_head, score_all
from inward.api.services import Services
from inward.errors import InwardError, NotFinite, OverQuota, Unavailable
from inward.types import HeadRef, Kind, Prompt, Scored, Scores, Usage, slowest
from inward.wire import Parts, RerankRequest, ScoringOptions
from inward.wire.compat import CompatRequest, rerank_dialect, score_dialect

POINTWISE: tuple[Kind, ...] = ("hybrid", "legend", "ensemble")
ErrorShape = Callable[[InwardError], dict[str, Any]]
"""Writes an error as a family of clients reads it."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A prompt and a response as the corridor takes them; ``rendered``: the chat template has been applied to the
    prompt.
    """

    prompt: Prompt
    response: str
    rendered: bool = False

    def parts(self) -> Parts:
        """See ``wire.Scorable``."""
        prompt = self.prompt if isinstance(self.prompt, str) else [dict(message) for message in self.prompt]
        return Parts(prompt, (self.response,), "prompt", ("response",), self.rendered)


@dataclass(frozen=True, slots=True)
class CompatScores:
    """What a head said of N texts; all of them have a score."""

    scored: tuple[Scored, ...]
    scores_N: tuple[float, ...]
    units_N: tuple[float, ...]
    """In [0, 1], in the same order: the calibrated probability where there is one."""
    truncated_N: tuple[bool, ...]

    @property
    def usage(self) -> Usage:
        """Of all of them."""
        return sum((scored.usage for scored in self.scored), Usage())

    @property
    def tokens(self) -> int:
        """Of all of them."""
        return self.usage.prompt_tokens + self.usage.completion_tokens

    def headers(self) -> dict[str, str]:
        """Timing, and what their bodies have no place for: which head and policy answered, and how many texts were
        cut.
        """
        if not self.scored:
            return {}
        head = self.scored[0].heads[0]
        return {
            **timing_headers(slowest(self.scored)),
            "x-inward-head": f"{head.name}/{head.version}",
            "x-inward-policy": self.scored[0].policy_version,
            "x-inward-truncated": str(sum(self.truncated_N)),
        }


async def score_conversations(
    services: Services, request: CompatRequest, field: str, items: Sequence[Conversation], *, truncate: bool
) -> CompatScores:
    """Scores ``items``, which came in the request's ``field``, one by one.

    Args:
        truncate: where the request does not say.

    Raises:
        InwardError: one of them could not be scored; their bodies have no place for an error beside scores.
    """
    head = requested_head(services, request, POINTWISE)
    if not items:
        return CompatScores((), (), (), ())
    options = ScoringOptions(truncate=truncate if request.truncate is None else request.truncate)
    try:
        results = (await score_all(services, field, items, (head.name,), options)).results
    except InwardError as error:
        raise _blaming(error, field) from None
    scored: list[Scored] = []
    for i, result in enumerate(results):
        if isinstance(result.outcome, InwardError):
            raise _blaming(result.outcome, field)
        if result.outcome.scores[0].scores_N[0] is None:
            raise NotFinite("the score is not a finite number", param=f"{field}.{i}")
        scored.append(result.outcome)
    return CompatScores(
        tuple(scored),
        tuple(_finite(outcome.scores[0], 0) for outcome in scored),
        tuple(unit(outcome.scores[0], 0) for outcome in scored),
        tuple(r.truncated for r in results),
    )


async def score_candidates(
    services: Services,
    request: CompatRequest,
    query: str,
    texts: Sequence[str],
    field: str,
    *,
    truncate: bool,
    kinds: Sequence[Kind] = (),
) -> CompatScores:
    """Scores ``texts``, which came in the request's ``field``, as the responses to one prompt, and raises as
    ``score_conversations``.

    Args:
        kinds: of heads; by default those that rank.
    """
    cut = truncate if request.truncate is None else request.truncate
    asked = RerankRequest(prompt=query, candidates=list(texts), truncate=cut)
    head = requested_head(services, request, kinds or RERANK_KINDS, None if kinds else services.rerank_head)
    try:
        found = await candidates(services, asked, (head.name,), Deadline(None, services.limits.timeout_s))
    except InwardError as error:
        raise _renamed(error, field) from None
    for answer in found.answers:
        if answer.error is not None:
            raise _renamed(answer.error, field)
    scores, n = found.scored.scores[0], range(len(texts))
    cuts = tuple(answer.truncated for answer in found.answers)
    return CompatScores((found.scored,), tuple(_finite(scores, i) for i in n), tuple(unit(scores, i) for i in n), cuts)


def requested_head(
    services: Services, request: CompatRequest, kinds: Sequence[Kind], default: str | None = None
) -> HeadRef:
    """The head that the request names by ``head``, or by a ``model`` that is a head's name; else the setting's, else
    ``default``, else the first that fits.

    Raises:
        NotFound: there is none, or the one that is named is of another kind.
    """
    if request.head is None and (model := getattr(request, "model", None)) and is_head(services, model):
        return find_head(services, model, kinds, "model")
    return find_head(services, request.head or services.compat_head or default, kinds)


def unit(scores: Scores, n: int) -> float:
    """The ``n``-th score in [0, 1]: its calibrated probability; else a cosine (of a listwise head) moved there, or
    the sigmoid.
    """
    if (probability := scores.probability(n)) is not None:
        return probability
    score = _finite(scores, n)
    if scores.listwise:
        return min(max((1 + score) / 2, 0.0), 1.0)
    return 1 / (1 + math.exp(-score)) if score >= 0 else math.exp(score) / (1 + math.exp(score))


def route_with_errors(shape_of: Callable[[bytes], ErrorShape | None]) -> type[JsonRoute]:
    """Routes whose errors have the shape that ``shape_of`` their body gives, and never the status 429: trainers take
    that for final.
    """

    class FamilyRoute(JsonRoute):
        """A route of other projects' clients."""

        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            """The handler that Starlette calls."""
            handle = super().get_route_handler()

            async def answer(request: Request) -> Response:
                try:
                    return await handle(request)
                except (InwardError, RequestValidationError) as error:
                    shape = shape_of(await request.body())
                    if shape is None:
                        raise
                    return error_response(error if isinstance(error, InwardError) else explain(error.errors()), shape)

            return answer

    return FamilyRoute


def native_route() -> type[JsonRoute]:
    """Routes that several dialects share; what is none of them is ours."""
    shapes: dict[str, ErrorShape] = {"as documents": as_documents, "as texts": as_tei, "as text pairs": as_vllm}

    def shape_of(body: bytes) -> ErrorShape | None:
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            return None
        return shapes.get(rerank_dialect(value)) or shapes.get(score_dialect(value))

    return route_with_errors(shape_of)


def error_response(error: InwardError, shape: ErrorShape) -> Response:
    """An error in a family's shape."""
    if isinstance(error, OverQuota):
        error = Unavailable(error.message, param=error.param, retry_after=error.retry_after)
    told = refusal(error).headers
    headers = {name: told[name] for name in ("retry-after", "www-authenticate") if name in told}
    return plain(shape(error), status=error.status, headers=headers)


def as_inward(error: InwardError) -> dict[str, Any]:
    """Our own shape, for clients that look at the status only."""
    return error.body()


def as_vllm(error: InwardError) -> dict[str, Any]:
    """vLLM's and OpenAI's."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.status}}


def as_cohere(error: InwardError) -> dict[str, Any]:
    """Cohere's."""
    return {"message": error.message}


def as_documents(error: InwardError) -> dict[str, Any]:
    """Of the paths that Cohere, Jina (``detail``) and vLLM share."""
    return {"message": error.message, "detail": error.message, **as_vllm(error)}


def as_fastapi(error: InwardError) -> dict[str, Any]:
    """NeMo Gym's, which is FastAPI's."""
    return {"detail": error.message}


def as_tei(error: InwardError) -> dict[str, Any]:
    """text-embeddings-inference's."""
    kinds = {"overloaded": "Overloaded", "unavailable": "Unhealthy", "engine_dead": "Unhealthy"}
    kind = kinds.get(error.code) or ("Validation" if error.status < 500 else "Backend")
    return {"error": error.message, "error_type": kind}


def _finite(scores: Scores, n: int) -> float:
    score = scores.scores_N[n]
    if score is None:
        raise NotFinite("the score is not a finite number")
    return score


def _blaming(error: InwardError, field: str) -> InwardError:
    """``error`` with the element of ``field`` to blame, whose inner fields are ours and not the caller's."""
    steps = (error.param or "").split(".")
    if steps[0] != field:
        return error
    return error.at(".".join(steps[:2]))


def _renamed(error: InwardError, field: str) -> InwardError:
    """``error`` with the caller's name for the prompt and the candidates."""
    head, dot, rest = (error.param or "").partition(".")
    theirs = {"candidates": field, "prompt": "query"}.get(head)
    return error if theirs is None else error.at(f"{theirs}{dot}{rest}")
