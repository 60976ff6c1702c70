"""The entrance of the corridor: admits groups as jobs, waits for their outcomes, and no longer than the deadline."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from inward import metrics, tracing
from inward.errors import DeadlineExceeded, InwardError, Unavailable, from_code
from inward.queues.base import Producer
from inward.types import Detail, Ended, Failed, Group, Job, News, Outcome, Piece, Priority, Sample, Scored

Heard = News | asyncio.Future[Outcome]
"""What comes of a job that is told: news, and in the end what became of it."""


class Intake:
    """Turns groups into jobs on ``queue`` and outcomes back into values or errors."""

    def __init__(
        self, queue: Producer, *, priority: Priority = "interactive", clock: Callable[[], float] = time.time
    ) -> None:
        self._queue = queue
        self._priority: Priority = priority
        self._clock = clock

    async def score(
        self,
        groups: Sequence[Group],
        *,
        heads: tuple[str, ...],
        details: frozenset[Detail] = frozenset(),
        pair: bool = False,
        timeout: float = 60.0,
    ) -> list[Scored | InwardError]:
        """Scores all groups; answers in their order, a failure in place of the group that failed.

        Cancelling this call (the caller hung up) abandons what is not computed yet.

        Raises:
            Overloaded: there is no room for all of them; nothing was admitted.
            EngineDead: the engine can't compute any more.
            Unavailable: the queue can't be reached.
            DeadlineExceeded: not all were done within ``timeout`` seconds.
        """
        if not groups:
            return []
        jobs = self._jobs(groups, heads, timeout, details, pair)
        waits = await self._queue.submit(jobs)
        try:
            async with asyncio.timeout(timeout):
                outcomes = await asyncio.gather(*waits)
        except TimeoutError:
            raise _late(timeout) from None
        finally:
            await self._queue.abandon([job.id for job in jobs])  # changes nothing for those that are settled
        return [_value(outcome) for outcome in outcomes]

    async def stream(self, groups: Sequence[Group], *, heads: tuple[str, ...], timeout: float = 60.0) -> Coming:
        """Admits all groups, and then gives what became of each as soon as it is there.

        Raises:
            InwardError: as ``score``; what refuses admission at once, a deadline later, out of what is given.
        """
        jobs = self._jobs(groups, heads, timeout)
        waits = await self._queue.submit(jobs)
        return Coming([job.id for job in jobs], waits, self._queue, jobs[0].deadline - self._clock(), timeout)

    async def tell(self, group: Group, *, heads: tuple[str, ...], timeout: float = 60.0) -> ComingText:
        """Admits a group with one response to be drawn, and then gives its text while it is drawn.

        Raises:
            InwardError: as ``stream``.
        """
        return ComingText(*await self._told(group, heads, timeout))

    async def follow(self, group: Group, *, heads: tuple[str, ...], timeout: float = 60.0) -> ComingSamples:
        """Admits a group with several responses to be drawn, and then gives each when it has ended.

        Raises:
            InwardError: as ``stream``.
        """
        return ComingSamples(*await self._told(group, heads, timeout))

    async def _told(
        self, group: Group, heads: tuple[str, ...], timeout: float
    ) -> tuple[str, Awaitable[Outcome], asyncio.Queue[Heard], Producer, float, float]:
        (job,) = (replace(job, told=True) for job in self._jobs([group], heads, timeout))
        news: asyncio.Queue[Heard] = asyncio.Queue()
        (wait,) = await self._queue.submit([job], news.put_nowait)
        return job.id, wait, news, self._queue, job.deadline - self._clock(), timeout

    def _jobs(
        self,
        groups: Sequence[Group],
        heads: tuple[str, ...],
        timeout: float,
        details: frozenset[Detail] = frozenset(),
        pair: bool = False,
    ) -> list[Job]:
        now, trace = self._clock(), tracing.present()
        return [
            Job(
                uuid.uuid4().hex, group, heads,
                details=details, pair=pair, deadline=now + timeout, enqueued=now, priority=self._priority, trace=trace,
            )
            for group in groups
        ]  # fmt: skip


class Coming:
    """Outcomes of admitted jobs, each with its place, as soon as it is there. Closing (the caller hung up) abandons
    what is not computed yet, also where nothing was asked for before.
    """

    def __init__(
        self, job_ids: Sequence[str], waits: Sequence[Awaitable[Outcome]], queue: Producer, left: float, timeout: float
    ) -> None:
        self._job_ids, self._queue, self._timeout = job_ids, queue, timeout
        self._end = asyncio.get_running_loop().time() + left
        self._places: dict[asyncio.Future[Outcome], int] = {asyncio.ensure_future(w): i for i, w in enumerate(waits)}
        self._left = set(self._places)
        self._done: deque[asyncio.Future[Outcome]] = deque()

    def __aiter__(self) -> Coming:
        return self

    async def __anext__(self) -> tuple[int, Scored | InwardError]:
        if not self._done:
            if not self._left:
                await self.aclose()
                raise StopAsyncIteration
            left = self._end - asyncio.get_running_loop().time()
            done, self._left = await asyncio.wait(self._left, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                raise _late(self._timeout)
            self._done.extend(sorted(done, key=self._places.__getitem__))
        future = self._done.popleft()
        return self._places[future], _value(future.result())

    async def aclose(self) -> None:
        """Nobody waits any more."""
        for future in self._left:
            future.cancel()
        await self._queue.abandon(self._job_ids)


class _Told:
    """An admitted job that is told. Closing it (the caller hung up) abandons what is not drawn yet."""

    def __init__(
        self,
        job_id: str,
        wait: Awaitable[Outcome],
        news: asyncio.Queue[Heard],
        queue: Producer,
        left: float,
        timeout: float,
    ) -> None:
        self._job_id, self._news, self._queue, self._timeout = job_id, news, queue, timeout
        self._begun = asyncio.get_running_loop().time()
        self._end = self._begun + left
        self._outcome = asyncio.ensure_future(wait)
        self._outcome.add_done_callback(news.put_nowait)
        self.scored: Scored | None = None
        """What became of it, once everything is given."""

    async def _next(self) -> Heard:
        try:
            async with asyncio.timeout_at(self._end):
                return await self._news.get()
        except TimeoutError:
            raise _late(self._timeout) from None

    async def aclose(self) -> None:
        """Nobody waits any more."""
        self._outcome.cancel()
        await self._queue.abandon([self._job_id])


class ComingText(_Told):
    """The text of an admitted job that is told, part by part as it is drawn; all parts are the whole of it, whatever
    was lost or told twice on the way.
    """

    _given = ""

    def __aiter__(self) -> ComingText:
        return self

    async def __anext__(self) -> str:
        """Raises InwardError for what went wrong."""
        while self.scored is None:
            news = await self._next()
            if isinstance(news, Ended):
                continue
            part = self._new(news) if isinstance(news, Piece) else self._rest(news.result())
            if part:
                if not self._given:
                    metrics.FIRST_TOKEN_SECONDS.observe(asyncio.get_running_loop().time() - self._begun)
                self._given += part
                return part
        raise StopAsyncIteration

    def _new(self, piece: Piece) -> str:
        """What of a piece was not given yet. After one that was lost nothing can be, until the outcome."""
        known = self._given[piece.start :]
        if not piece.text.startswith(known) and not known.startswith(piece.text):
            raise _another()
        return piece.text[len(known) :] if piece.start <= len(self._given) else ""

    def _rest(self, outcome: Outcome) -> str:
        value = _success(outcome)
        text = value.samples[0].text
        if not text.startswith(self._given):
            raise _another()
        self.scored = value
        return text[len(self._given) :]


class ComingSamples(_Told):
    """The responses of an admitted job that is told, each when it has ended, by its index. What was lost on the way is
    not among them: ``scored`` has all.
    """

    def __init__(self, *told: Any) -> None:
        super().__init__(*told)
        self._given: dict[int, Ended] = {}

    def __aiter__(self) -> ComingSamples:
        return self

    async def __anext__(self) -> Ended:
        """Raises InwardError for what went wrong."""
        while self.scored is None:
            news = await self._next()
            if isinstance(news, Ended):
                before = self._given.setdefault(news.index, news)
                if before is news:
                    return news
                _check_same(before.sample, news.sample)
            elif not isinstance(news, Piece):
                scored = _success(news.result())
                for index, ended in self._given.items():
                    _check_same(ended.sample, scored.samples[index])
                self.scored = scored
        raise StopAsyncIteration


def _check_same(one: Sample, other: Sample) -> None:
    """Raises Unavailable where these can't be the same response; a guard may end it a token earlier or later."""
    n = min(len(one.ids), len(other.ids))
    if one.ids[:n] != other.ids[:n]:
        raise _another()


def _success(outcome: Outcome) -> Scored:
    value = _value(outcome)
    if isinstance(value, InwardError):
        raise value
    return value


def _another() -> Unavailable:
    return Unavailable(
        "the worker that drew this answer ended, and the next one drew another: send it again, or give it a seed",
        retry_after=1.0,
    )


def _late(timeout: float) -> DeadlineExceeded:
    metrics.EXPIRED_TOTAL.inc()
    return DeadlineExceeded(f"not done within {timeout:g} s; send fewer items at once or a longer timeout")


def _value(outcome: Outcome) -> Scored | InwardError:
    if isinstance(outcome, Failed):
        return from_code(outcome.code, outcome.message, param=outcome.param)
    return outcome
