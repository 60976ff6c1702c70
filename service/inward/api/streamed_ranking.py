"""``/rerank`` with ``"stream": true``: each answer as soon as it is drawn and scored, and the ranking in the end.

Every answer is a job of its own, so nothing else in the service knows of streaming: deadlines, hang-ups and several
workers are those of any other job, and a seed gives answer ``i`` the seed ``seed + i``, as vLLM does within one job.
Only where they are compared while they are drawn (early rejection) all are one job, as without a stream, which is told.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace

from inward.api.candidates import (
    Candidate,
    Candidates,
    Generation,
    drawn,
    generation,
    ranking_heads,
    sampled,
    score_one,
)
from inward.api.events import EventStream, event
from inward.api.ranking import one_ranked, ranking
from inward.api.scoring import Deadline, charge
from inward.api.services import Services
from inward.errors import InwardError, Unavailable
from inward.intake import Coming, ComingSamples, ComingText
from inward.types import Group, HeadRef, Scored, Scores, Timing, Usage
from inward.wire import RerankAnswer, RerankRequest


async def stream_ranking(
    services: Services, request: RerankRequest, head: HeadRef, finish: Callable[[RerankAnswer], Awaitable[None]]
) -> EventStream:
    """Events ``sample``, a ``Ranked`` each (with a listwise head without its score), then ``result``, a
    ``RerankAnswer``.

    Args:
        finish: is given the answer before it is sent.

    Raises:
        InwardError: nothing has begun; what goes wrong later is an event ``error``.
    """
    deadline = Deadline(request.timeout, services.limits.timeout_s)
    wanted = await generation(services, request, head.name)
    heads = ranking_heads(services, head)
    if together_only(wanted):
        samples = await begin_group(services, wanted, heads, deadline)
        events = _group_events(services, request, wanted, samples, finish)
    else:
        outcomes = await begin(services, wanted, heads, deadline)
        events = _events(services, request, wanted, outcomes, deadline, finish)
    await anext(events)  # a generator that was never begun would not close what comes when it is closed
    return EventStream(events)


def together_only(wanted: Generation) -> bool:
    """Whether the answers are compared while they are drawn, so that they have to be one job."""
    return wanted.spec.early_rejection is not None and wanted.spec.n > 1


async def begin(services: Services, wanted: Generation, heads: tuple[str, ...], deadline: Deadline) -> Coming:
    """Admits each answer that is wanted as a job of its own.

    Raises:
        InwardError: they were not admitted.
    """
    spec = wanted.spec
    alone = [replace(spec, n=1, seed=None if spec.seed is None else (spec.seed + i) % 2**32) for i in range(spec.n)]
    groups = [Group(wanted.prompt_ids, sampling=one) for one in alone]
    await charge(services, groups)
    return await services.intake.stream(groups, heads=heads, timeout=deadline.left)


async def begin_text(services: Services, wanted: Generation, heads: tuple[str, ...], deadline: Deadline) -> ComingText:
    """Admits the one answer that is wanted, to be told while it is drawn.

    Raises:
        InwardError: it was not admitted.
    """
    group = Group(wanted.prompt_ids, sampling=wanted.spec)
    await charge(services, [group])
    return await services.intake.tell(group, heads=heads, timeout=deadline.left)


async def begin_group(
    services: Services, wanted: Generation, heads: tuple[str, ...], deadline: Deadline
) -> ComingSamples:
    """Admits all answers as one job, to be told of each when it ends.

    Raises:
        InwardError: it was not admitted.
    """
    group = Group(wanted.prompt_ids, sampling=wanted.spec)
    await charge(services, [group])
    return await services.intake.follow(group, heads=heads, timeout=deadline.left)


async def _group_events(
    services: Services,
    request: RerankRequest,
    wanted: Generation,
    samples: ComingSamples,
    finish: Callable[[RerankAnswer], Awaitable[None]],
) -> AsyncGenerator[str, None]:
    try:
        yield ""  # begun
        async with aclosing(ended(wanted, samples)) as answers:
            async for i, one in answers:
                yield event("sample", one_ranked(i, one, request, wanted.truncated))
    finally:
        await samples.aclose()
    assert samples.scored is not None
    answer, _ = ranking(services, request, wanted.found(samples.scored))
    await finish(answer)
    yield event("result", answer)


async def ended(wanted: Generation, samples: ComingSamples) -> AsyncGenerator[tuple[int, Candidate], None]:
    """Each answer of one job when it ends, with its number; in the end those of which nobody told."""
    given = set()
    async for news in samples:
        given.add(news.index)
        found = drawn(news.sample)
        if news.sample.finished:
            found = replace(found, score=news.score, probability=news.probability)
        yield news.index, wanted.counted(found)
    assert samples.scored is not None
    for i in range(len(samples.scored.samples)):
        if i not in given:
            yield i, wanted.counted(candidate(samples.scored, i))


async def _events(
    services: Services,
    request: RerankRequest,
    wanted: Generation,
    outcomes: Coming,
    deadline: Deadline,
    finish: Callable[[RerankAnswer], Awaitable[None]],
) -> AsyncGenerator[str, None]:
    found_by: dict[int, Scored] = {}
    try:
        yield ""  # begun
        async for i, scored in successes(outcomes):
            found_by[i] = scored
            yield event("sample", one_ranked(i, wanted.counted(candidate(scored)), request, wanted.truncated))
    finally:
        await outcomes.aclose()
    found = await together(services, wanted, [found_by[i] for i in range(len(found_by))], deadline)
    answer, _ = ranking(services, request, found)
    await finish(answer)
    yield event("result", answer)


async def successes(outcomes: AsyncIterator[tuple[int, Scored | InwardError]]) -> AsyncIterator[tuple[int, Scored]]:
    """Each answer with its number, or what went wrong, raised."""
    async for i, outcome in outcomes:
        if isinstance(outcome, InwardError):
            raise outcome
        yield i, outcome


def candidate(scored: Scored, n: int = 0) -> Candidate:
    """What is known of an answer by itself."""
    found = sampled(scored, n)
    return replace(found, score=None, error=None) if scored.scores[0].listwise and found.finished else found


async def together(services: Services, wanted: Generation, drawn: Sequence[Scored], deadline: Deadline) -> Candidates:
    """All answers as one list, which a listwise head has still to see.

    Raises:
        Unavailable: they are not all of one version of head and policy.
    """
    switched = Unavailable("the head or the policy was switched during this stream; send it again", retry_after=1.0)
    if len({scored.version for scored in drawn}) > 1:
        raise switched
    samples = tuple(scored.samples[0] for scored in drawn)
    one = _as_one(drawn)
    if one.scores[0].listwise:
        listed = Group(wanted.prompt_ids, tuple(sample.ids for sample in samples))
        read = await score_one(services, listed, tuple(ref.name for ref in one.heads), deadline)
        if read.version != one.version:
            raise switched
        one = replace(read, samples=samples, usage=one.usage)
    return wanted.found(one)


def _as_one(drawn: Sequence[Scored]) -> Scored:
    """Outcomes of one answer each as one of all of them."""
    listed = tuple(map(_listed, zip(*(scored.scores for scored in drawn), strict=True)))
    samples = tuple(scored.samples[0] for scored in drawn)
    usage = sum((scored.usage for scored in drawn), Usage())
    return replace(drawn[0], scores=listed, samples=samples, usage=usage, timing=_longest(drawn))


def _listed(scores: Sequence[Scores]) -> Scores:
    """What one head says of one answer each as what it says of all of them."""
    probability_N = tuple(one.probability_N[0] if one.probability_N else None for one in scores)
    return replace(
        scores[0],
        scores_N=tuple(one.scores_N[0] for one in scores),
        probability_N=probability_N if scores[0].probability_N else None,
    )


def _longest(drawn: Sequence[Scored]) -> Timing:
    return max((scored.timing for scored in drawn), key=lambda timing: timing.queued + timing.inference)
