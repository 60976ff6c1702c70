"""The queue in one process: the embedded default, and what most tests use."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from inward import metrics
from inward.errors import EngineDead, Overloaded
from inward.queues.base import Closed, Hear
from inward.queues.throughput import Throughput
from inward.types import Failed, Job, News, Outcome


class MemoryQueue:
    """First in, first out, within a bound on tokens: what waits and what is being computed together.

    Args:
        max_tokens: room for this many tokens to compute; a single larger request is admitted when nothing else is
            there.
        clock: monotonic seconds, for the pace.
    """

    def __init__(self, *, max_tokens: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_tokens = max_tokens
        self.pace = Throughput()
        self._clock = clock
        self._waiting: deque[Job] = deque()
        self._open: dict[str, tuple[Job, asyncio.Future[Outcome]]] = {}
        self._hear: dict[str, Hear] = {}  # of the open jobs that are told
        self._tokens = 0
        self._arrival = asyncio.Event()
        self._closed = False
        self._dead: str | None = None

    @property
    def tokens(self) -> int:
        """Tokens admitted and not settled."""
        return self._tokens

    async def submit(self, jobs: Sequence[Job], hear: Hear | None = None) -> list[Awaitable[Outcome]]:
        if self._dead is not None:
            raise EngineDead(f"the engine is dead: {self._dead}", retry_after=10.0)
        if self._closed:
            raise Overloaded("the server is shutting down", retry_after=1.0)
        cost = sum(job.group.tokens for job in jobs)
        if self._tokens and self._tokens + cost > self.max_tokens:
            metrics.REJECTIONS_TOTAL.labels(reason="queue_full").inc()
            raise Overloaded(
                f"the queue holds {self._tokens} of {self.max_tokens} tokens and this request needs {cost} more",
                retry_after=self.retry_after(cost),
            )
        if not self._open:
            self.pace.start(self._clock())
        futures: list[Awaitable[Outcome]] = []
        for job in jobs:
            future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
            self._open[job.id] = (job, future)
            if hear is not None and job.told:
                self._hear[job.id] = hear
            self._waiting.append(job)
            futures.append(future)
        self._tokens += cost
        self._observe()
        self._arrival.set()
        return futures

    def retry_after(self, cost: int) -> float:
        """Seconds until there is room for ``cost`` more tokens at the present pace; 1 before anything was measured."""
        return self.pace.seconds(min(self._tokens + cost - self.max_tokens, self._tokens))

    async def abandon(self, job_ids: Sequence[str]) -> None:
        for job_id in job_ids:
            if (entry := self._open.get(job_id)) is not None:
                entry[1].cancel()
        gone = [job for job in self._waiting if self._open[job.id][1].cancelled()]
        if gone:
            self._waiting = deque(job for job in self._waiting if not self._open[job.id][1].cancelled())
            self._forget(gone)

    async def take(self, tokens: int) -> list[Job]:
        while not self._waiting:
            if self._closed:
                raise Closed
            self._arrival.clear()
            await self._arrival.wait()
        taken = [self._waiting.popleft()]
        spent = taken[0].group.tokens
        while self._waiting and spent + self._waiting[0].group.tokens <= tokens:
            taken.append(self._waiting.popleft())
            spent += taken[-1].group.tokens
        self._observe()
        return taken

    async def wanted(self, jobs: Sequence[Job]) -> list[Job]:
        gone = [job for job in jobs if job.id not in self._open or self._open[job.id][1].done()]
        self._forget(gone)
        return [job for job in jobs if job.id in self._open]

    async def tell(self, news: News) -> bool:
        hear = self._hear.get(news.job_id)
        if hear is not None and not self._open[news.job_id][1].done():
            hear(news)
        return True

    async def settle(self, outcomes: Sequence[Outcome]) -> None:
        tokens = 0
        for outcome in outcomes:
            if (entry := self._open.pop(outcome.job_id, None)) is None:
                continue
            self._hear.pop(outcome.job_id, None)
            job, future = entry
            tokens += job.group.tokens
            if not future.done():
                future.set_result(outcome)
        self._tokens -= tokens
        self.pace.settled(tokens, self._clock())
        self._observe()

    async def release(self, jobs: Sequence[Job], reason: str) -> None:
        """There is no other worker in this process: these jobs fail, those that wait as well, and no more are
        admitted.
        """
        self._dead = reason
        left = [*jobs, *self._waiting]
        self._waiting.clear()
        await self.settle([Failed(job.id, EngineDead.code, f"the engine is dead: {reason}") for job in left])

    async def close(self) -> None:
        self._closed = True
        self._arrival.set()

    def _forget(self, jobs: Sequence[Job]) -> None:
        """Nobody waits for these: their room is free again."""
        for job in jobs:
            self._hear.pop(job.id, None)
            if self._open.pop(job.id, None) is not None:
                self._tokens -= job.group.tokens
                metrics.ABANDONED_TOTAL.inc()
        self._observe()

    def _observe(self) -> None:
        metrics.QUEUE_JOBS.set(len(self._waiting))
        metrics.QUEUE_TOKENS.set(self._tokens)
