"""The candidates of ``/rerank``, given in the request or drawn from the model, and what the head says of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from inward.api.scoring import Deadline, score_groups
from inward.api.services import Services
from inward.errors import InvalidField, InwardError, NotFinite, TooLarge
from inward.prompts import Grouped, Texts
from inward.types import Group, Ids, Prompt, SamplingSpec, Scored
from inward.wire import Parts, RerankRequest, Sampling

MAX_TOKENS = 256
"""Of a drawn answer, where the request does not say."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One answer: scored, or with the error that it has instead."""

    text: str
    ids: Ids = ()
    score: float | None = None
    probability: float | None = None
    finish_reason: Literal["stop", "length"] | None = None
    error: InwardError | None = None


@dataclass(frozen=True, slots=True)
class Candidates:
    """All answers to one prompt, in the order in which they came."""

    scored: Scored
    prompt_ids: Ids
    answers: Sequence[Candidate]
    truncated: bool = False

    def pair(self, chosen: int, rejected: int) -> Group:
        """Two of them as a group."""
        return Group(self.prompt_ids, (self.answers[chosen].ids, self.answers[rejected].ids))


@dataclass(frozen=True, slots=True)
class Generation:
    """What is to be drawn."""

    prompt_ids: Ids
    spec: SamplingSpec
    truncated: bool

    def found(self, scored: Scored) -> Candidates:
        """What was drawn."""
        answers = [
            answered(scored, i, Candidate(sample.text, sample.ids, finish_reason=sample.finish_reason))
            for i, sample in enumerate(scored.samples)
        ]
        return Candidates(scored, self.prompt_ids, answers, self.truncated)


async def candidates(services: Services, request: RerankRequest, head: str, deadline: Deadline) -> Candidates:
    """Scores the candidates; those that can't be scored have an error.

    Raises:
        InwardError: the service could not do its part.
    """
    if request.candidates is None:
        wanted = await generation(services, request)
        found = wanted.found(await score_one(services, Group(wanted.prompt_ids, sampling=wanted.spec), head, deadline))
    else:
        prompt, field = request.asked()
        found = await _given(services, request.candidates, request.truncate, prompt, field, head, deadline)
    return found


async def generation(services: Services, request: RerankRequest) -> Generation:
    """What a request without candidates asks for. Raises as ``to_draw``."""
    prompt, field = request.asked()
    texts = Texts(prompt, (), request.truncate)
    return await to_draw(services, texts, field, request.n or 1, request.sampling or Sampling())


async def to_draw(services: Services, texts: Texts, field: str, n: int, sampling: Sampling) -> Generation:
    """``n`` answers to the prompt of ``texts``, which came in the request's ``field``.

    Raises:
        InwardError: the prompt can't be used, or more is asked for than the model or the service gives.
    """
    if n > (most := services.limits.candidates):
        raise TooLarge(f"n is {n} and one request may draw {most} answers; send several", param="n")
    (grouped,) = await services.prompts.group_many([texts])
    if isinstance(grouped, InwardError):
        raise type(grouped)(grouped.message, param=Parts(texts.prompt, (), field, ()).blame(grouped.param))
    prompt_ids = grouped.group.prompt_ids
    if not prompt_ids:
        raise InvalidField("the prompt is empty: there is nothing to go on with", param=field)
    spec = _spec(n, sampling, services.prompts.max_tokens - 1 - len(prompt_ids))
    return Generation(prompt_ids, spec, grouped.truncated)


def _spec(n: int, sampling: Sampling, room: int) -> SamplingSpec:
    """``room``: tokens that the model takes after the prompt."""
    if (sampling.max_tokens or 1) > room:
        raise TooLarge(
            f"after the prompt the model takes {max(room, 0)} more tokens; ask for fewer, or shorten the prompt",
            param="sampling.max_tokens",
        )
    given = sampling.model_dump(exclude={"max_tokens", "stop"})
    return SamplingSpec(n, max_tokens=sampling.max_tokens or min(MAX_TOKENS, room), stop=tuple(sampling.stop), **given)


async def _given(
    services: Services, texts: Sequence[str], truncate: bool, prompt: Prompt, field: str, head: str, deadline: Deadline
) -> Candidates:
    """All that can be used are one group, tokenised together as they are scored. Only where that fails, each is tried
    alone, to find those to blame.
    """

    async def group(places: Sequence[int]) -> Grouped | InwardError:
        return (await services.prompts.group_many([Texts(prompt, tuple(texts[i] for i in places), truncate)]))[0]

    usable = list(range(len(texts)))
    answers = [Candidate(text) for text in texts]
    grouped = await group(usable)
    if isinstance(grouped, InwardError):
        for i, alone in enumerate(
            await services.prompts.group_many([Texts(prompt, (text,), truncate) for text in texts])
        ):
            if isinstance(alone, InwardError):
                parts = Parts(prompt, (texts[i],), field, (f"candidates.{i}",))
                answers[i] = replace(answers[i], error=type(alone)(alone.message, param=parts.blame(alone.param)))
        usable = [i for i in usable if answers[i].error is None]
        if not usable:
            raise next(answer.error for answer in answers if answer.error is not None)
        grouped = await group(usable)
    if isinstance(grouped, InwardError):
        raise grouped
    scored = await score_one(services, grouped.group, head, deadline)
    for n, i in enumerate(usable):
        answers[i] = answered(scored, n, replace(answers[i], ids=grouped.group.responses_ids[n]), f"candidates.{i}")
    return Candidates(scored, grouped.group.prompt_ids, answers, grouped.truncated)


async def score_one(services: Services, group: Group, head: str, deadline: Deadline) -> Scored:
    """Scores a group, or raises why it can't be scored."""
    (scored,) = await score_groups(services, [group], (head,), deadline)
    if isinstance(scored, InwardError):
        raise scored
    return scored


def answered(scored: Scored, n: int, candidate: Candidate, param: str | None = None) -> Candidate:
    """``candidate`` with what the head says of the ``n``-th response."""
    scores = scored.scores[0]
    if scores.scores_N[n] is None:
        return replace(candidate, error=NotFinite("the score is not a finite number", param=param))
    probability = scores.probability_N[n] if scores.probability_N else None
    return replace(candidate, score=scores.scores_N[n], probability=probability)
