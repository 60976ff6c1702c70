"""``/rerank`` with ``"stream": true``: each answer as soon as it is drawn and scored, and the ranking in the end.

Every answer is a job of its own, so nothing else in the service knows of streaming: deadlines, hang-ups and several
workers are those of any other job, and a seed gives answer ``i`` the seed ``seed + i``, as vLLM does within one job.
Only where they are compared while they are drawn (early rejection) all are one job, as without a stream, which is told.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Protocol

from inward.api.candidates import Candidate, Candidates, Generation, drawn, generation, joined, sampled, score_one
from inward.api.elements import with_confidence
from inward.api.events import EventStream, event
from inward.api.ranking import one_ranked, ranking
from inward.api.scoring import Deadline, charge
from inward.api.services import Services
from inward.errors import InwardError, Unavailable
from inward.intake import Coming, ComingSamples
from inward.types import Group, HeadRef, Scored
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
    events = _events(services, request, head, finish)
    await anext(events)
    return EventStream(events)


async def _events(
    services: Services, request: RerankRequest, head: HeadRef, finish: Callable[[RerankAnswer], Awaitable[None]]
) -> AsyncGenerator[str, None]:
    deadline = Deadline(request.timeout, services.limits.timeout_s)
    wanted = await generation(services, request, head.name)
    async with aclosing(await begin(services, wanted, with_confidence(services, head), deadline)) as drawing:
        yield ""  # admitted; a generator that was never begun would not close what comes when it is closed
        async with aclosing(drawing.answers()) as answers:
            async for i, one in answers:
                yield event("sample", one_ranked(i, one, request))
    answer, _ = ranking(services, request, await drawing.whole())
    await finish(answer)
    yield event("result", answer)


class Drawing(Protocol):
    """Answers that were admitted, while they are drawn. Closing it (the caller hung up) abandons what is not drawn
    yet.
    """

    def answers(self) -> AsyncGenerator[tuple[int, Candidate], None]:
        """Each when it has ended, with its number. Raises InwardError for what went wrong."""
        ...

    async def whole(self) -> Candidates:
        """All of them, once each was given."""
        ...

    async def aclose(self) -> None: ...


async def begin(services: Services, wanted: Generation, heads: tuple[str, ...], deadline: Deadline) -> Drawing:
    """Admits each answer that is wanted as a job of its own, or all as one job where they are compared while they are
    drawn.

    Raises:
        InwardError: they were not admitted.
    """
    spec = wanted.spec
    if spec.early_rejection is not None and spec.n > 1:
        group = Group(wanted.prompt_ids, sampling=spec)
        async with charge(services, [group]):
            return _OneJob(wanted, await services.intake.follow(group, heads=heads, timeout=deadline.left))
    alone = [replace(spec, n=1, seed=None if spec.seed is None else (spec.seed + i) % 2**32) for i in range(spec.n)]
    groups = [Group(wanted.prompt_ids, sampling=one) for one in alone]
    async with charge(services, groups):
        coming = await services.intake.stream(groups, heads=heads, timeout=deadline.left)
    return _JobEach(services, wanted, coming, deadline)


@dataclass(frozen=True, slots=True)
class _OneJob:
    """All answers as one job, since they are compared while they are drawn."""

    wanted: Generation
    samples: ComingSamples

    async def answers(self) -> AsyncGenerator[tuple[int, Candidate], None]:
        """In the end those of which nobody told."""
        given = set()
        async for news in self.samples:
            given.add(news.index)
            found = drawn(news.sample)
            if news.sample.finished:
                found = replace(found, score=news.score, probability=news.probability)
            yield news.index, self.wanted.counted(found)
        assert self.samples.scored is not None
        for i in range(len(self.samples.scored.samples)):
            if i not in given:
                yield i, self.wanted.counted(candidate(self.samples.scored, i))

    async def whole(self) -> Candidates:
        assert self.samples.scored is not None
        return self.wanted.found(self.samples.scored)

    async def aclose(self) -> None:
        await self.samples.aclose()


@dataclass(frozen=True, slots=True)
class _JobEach:
    """A job for each answer."""

    services: Services
    wanted: Generation
    outcomes: Coming
    deadline: Deadline
    scored: dict[int, Scored] = field(default_factory=dict)

    async def answers(self) -> AsyncGenerator[tuple[int, Candidate], None]:
        async for i, outcome in self.outcomes:
            if isinstance(outcome, InwardError):
                raise outcome
            self.scored[i] = outcome
            yield i, self.wanted.counted(candidate(outcome))

    async def whole(self) -> Candidates:
        in_order = [self.scored[i] for i in range(len(self.scored))]
        return await together(self.services, self.wanted, in_order, self.deadline)

    async def aclose(self) -> None:
        await self.outcomes.aclose()


def candidate(scored: Scored, n: int = 0) -> Candidate:
    """What is known of an answer by itself."""
    found = sampled(scored, n)
    return replace(found, score=None, error=None) if scored.scores[0].listwise and found.finished else found


async def together(services: Services, wanted: Generation, drawn: Sequence[Scored], deadline: Deadline) -> Candidates:
    """All answers as one list, of which a listwise head has still to see those that were drawn to their end.

    Raises:
        Unavailable: they are not all of one version of head and policy.
    """
    switched = Unavailable("the head or the policy was switched during this stream; send it again", retry_after=1.0)
    if len({scored.version for scored in drawn}) > 1:
        raise switched
    samples = tuple(scored.samples[0] for scored in drawn)
    one = joined([([i], scored) for i, scored in enumerate(drawn)], len(drawn))
    finished = [i for i, sample in enumerate(samples) if sample.finished]
    if one.scores[0].listwise and finished:
        listed = Group(wanted.prompt_ids, tuple(samples[i].ids for i in finished))
        read = await score_one(services, listed, tuple(ref.name for ref in one.heads), deadline)
        if read.version != one.version:
            raise switched
        one = replace(joined([(finished, read)], len(samples)), usage=one.usage)
    return wanted.found(replace(one, samples=samples))
