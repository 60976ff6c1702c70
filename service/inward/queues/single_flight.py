"""Identical items are computed once: those that wait at the same time, and those asked for again shortly after.

A client that gave up waiting and sends its request again, or many of them with the same prompt, cost one forward pass.
An item with samples still to be drawn is only ever identical to another one of the same seed, and one that is told
while it is drawn to none. Each replica does so by
itself: agreeing with the others cost every request more than it saved in a storm of retries (BENCHMARKS.md).
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

from inward import codec, metrics
from inward.queues.base import Hear, Producer
from inward.types import Job, Outcome, Scored

Content = bytes
"""Hash of all that an outcome depends on."""
MOST_KEPT = 4096
"""Outcomes kept for those who ask again; the oldest go first."""


@dataclass(slots=True, eq=False)
class _Run:
    """One job in the queue, and the ids of all that wait for it."""

    job: Job
    content: Content
    outcome: asyncio.Task[Outcome]
    waiting: set[str] = field(default_factory=set)


class SingleFlight:
    """A producer in front of another one.

    Args:
        window: seconds for which an outcome is kept for those who ask again; 0 shares only among those who wait at the
            same time.
        current: whether an outcome is what would be computed now (no head or policy was switched since).
        clock: monotonic seconds.
    """

    def __init__(
        self,
        producer: Producer,
        *,
        window: float,
        current: Callable[[Scored], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._producer, self._window, self._current, self._clock = producer, window, current, clock
        self._running: dict[Content, _Run] = {}
        self._of: dict[str, _Run] = {}  # by the id of everybody who waits
        self._kept: OrderedDict[Content, tuple[float, Scored]] = OrderedDict()  # the oldest first

    async def submit(self, jobs: Sequence[Job], hear: Hear | None = None) -> list[Awaitable[Outcome]]:
        contents = [_content(job) for job in jobs]
        first: dict[Content, Job] = {}
        alone: list[Job] = []
        for job, content in zip(jobs, contents, strict=True):
            if content is None:
                alone.append(job)
            elif content not in self._running and self._recall(content) is None:
                first.setdefault(content, job)
        sent = [*first.values(), *alone]
        answers = await self._producer.submit(sent, hear) if sent else []
        waits = dict(zip((job.id for job in sent), answers, strict=True))
        for content, job in first.items():
            self._start(job, content, waits[job.id])
        return [
            waits[job.id] if content is None else self._wait(job, content)
            for job, content in zip(jobs, contents, strict=True)
        ]

    async def abandon(self, job_ids: Sequence[str]) -> None:
        gone: list[str] = []
        for job_id in job_ids:
            run = self._of.pop(job_id, None)
            if run is None:
                gone.append(job_id)  # not shared; or settled, then it changes nothing
                continue
            run.waiting.discard(job_id)
            if not run.waiting and not run.outcome.done():
                self._end(run)
                gone.append(run.job.id)
        await self._producer.abandon(gone)

    async def close(self) -> None:
        await self._producer.close()

    def _start(self, job: Job, content: Content, answer: Awaitable[Outcome]) -> None:
        run = _Run(job, content, asyncio.create_task(_answered(answer)))
        self._running[content] = run
        run.outcome.add_done_callback(lambda _: self._done(run))

    def _wait(self, job: Job, content: Content) -> Awaitable[Outcome]:
        run = self._running.get(content)
        if run is None:
            return self._again(job, content)
        if job.id != run.job.id:
            metrics.SHARED_TOTAL.inc()
        run.waiting.add(job.id)
        self._of[job.id] = run
        return self._follow(job, run)

    async def _follow(self, job: Job, run: _Run) -> Outcome:
        outcome = await asyncio.shield(run.outcome)
        self._of.pop(job.id, None)
        if job.id == run.job.id or (isinstance(outcome, Scored) and self._current(outcome)):
            return replace(outcome, job_id=job.id)
        # it failed for reasons of its own, such as its deadline, or is of a former version
        [answer] = await self._producer.submit([job])
        return await answer

    async def _again(self, job: Job, content: Content) -> Outcome:
        if (kept := self._recall(content)) is not None:
            metrics.SHARED_TOTAL.inc()
            return replace(kept, job_id=job.id)
        [answer] = await self._producer.submit([job])
        return await answer

    def _recall(self, content: Content) -> Scored | None:
        until, scored = self._kept.get(content, (0.0, None))
        return scored if scored is not None and until > self._clock() and self._current(scored) else None

    def _done(self, run: _Run) -> None:
        self._end(run)
        failed = run.outcome.cancelled() or run.outcome.exception() is not None
        outcome = None if failed else run.outcome.result()
        if not self._window:
            return
        now = self._clock()
        while self._kept and next(iter(self._kept.values()))[0] <= now:
            self._kept.popitem(last=False)
        if isinstance(outcome, Scored):
            self._kept.pop(run.content, None)
            self._kept[run.content] = (now + self._window, outcome)
        while len(self._kept) > MOST_KEPT:
            self._kept.popitem(last=False)

    def _end(self, run: _Run) -> None:
        if self._running.get(run.content) is run:
            del self._running[run.content]
        run.outcome.cancel()


async def _answered(answer: Awaitable[Outcome]) -> Outcome:
    return await answer


def _content(job: Job) -> Content | None:
    """What makes two jobs identical; None for one whose samples differ each time, or that is told."""
    sampling = job.group.sampling
    if job.told or (sampling is not None and sampling.seed is None):
        return None
    bare = Job("", job.group, job.heads, job.details, job.pair)
    return hashlib.blake2b(codec.encode(bare), digest_size=16).digest()
