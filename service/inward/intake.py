"""The entrance of the corridor: admits groups as jobs, waits for their outcomes, and no longer than the deadline."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

from inward import metrics, tracing
from inward.errors import DeadlineExceeded, InwardError, from_code
from inward.queues.base import Producer
from inward.types import Detail, Failed, Group, Job, Outcome, Priority, Scored


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

    async def stream(
        self, groups: Sequence[Group], *, heads: tuple[str, ...], timeout: float = 60.0
    ) -> AsyncGenerator[tuple[int, Scored | InwardError], None]:
        """Admits all groups, and then gives what became of each, with its place, as soon as it is there.

        Closing the generator (the caller hung up) abandons what is not computed yet.

        Raises:
            InwardError: as ``score``; what refuses admission at once, a deadline later, out of the generator.
        """
        jobs = self._jobs(groups, heads, timeout)
        return self._as_done(jobs, await self._queue.submit(jobs), timeout)

    async def _as_done(
        self, jobs: Sequence[Job], waits: Sequence[Awaitable[Outcome]], timeout: float
    ) -> AsyncGenerator[tuple[int, Scored | InwardError], None]:
        places = {asyncio.ensure_future(wait): i for i, wait in enumerate(waits)}
        left = set(places)
        try:
            while left:
                done, left = await asyncio.wait(
                    left, timeout=jobs[0].deadline - self._clock(), return_when=asyncio.FIRST_COMPLETED
                )
                if not done:
                    raise _late(timeout)
                for future in sorted(done, key=places.__getitem__):
                    yield places[future], _value(future.result())
        finally:
            for future in left:
                future.cancel()
            await self._queue.abandon([job.id for job in jobs])

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


def _late(timeout: float) -> DeadlineExceeded:
    metrics.EXPIRED_TOTAL.inc()
    return DeadlineExceeded(f"not done within {timeout:g} s; send fewer items at once or a longer timeout")


def _value(outcome: Outcome) -> Scored | InwardError:
    return from_code(outcome.code, outcome.message) if isinstance(outcome, Failed) else outcome
