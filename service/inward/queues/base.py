"""What crosses the corridor: jobs one way, outcomes the other. One protocol, a queue in the process and one in
Redis.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from inward.types import Job, News, Outcome

Hear = Callable[[News], None]
"""Takes in what is told of jobs, each before the outcome of its job."""


class Producer(Protocol):
    """The API's side: jobs go in, and whoever submitted them is answered exactly once, or has left."""

    async def submit(self, jobs: Sequence[Job], hear: Hear | None = None) -> list[Awaitable[Outcome]]:
        """Admits all jobs or none.

        Args:
            hear: is given the news of those that are told.

        Raises:
            Overloaded: there is no room; ``retry_after`` says in how many seconds there should be.
            EngineDead: nobody is there to take them.
            Unavailable: the queue can't be reached.
        """
        ...

    async def abandon(self, job_ids: Sequence[str]) -> None:
        """Nobody waits for these any more: they are not computed, unless they already are."""
        ...

    async def close(self) -> None:
        """No more jobs are admitted."""
        ...


class Consumer(Protocol):
    """The worker's side: jobs are taken, and each is settled or released."""

    async def take(self, tokens: int) -> list[Job]:
        """Waits for at least one job; gives the oldest ones up to ``tokens`` (one larger job is given alone)."""
        ...

    async def wanted(self, jobs: Sequence[Job]) -> list[Job]:
        """Those of the jobs taken that somebody still waits for; the others are settled by this."""
        ...

    async def tell(self, news: News) -> bool:
        """Gives news of a job that was taken to whoever waits for it; False where they can't be had now. They are told
        one after the other, and before the job is settled.
        """
        ...

    async def settle(self, outcomes: Sequence[Outcome]) -> None:
        """Answers jobs that were taken. Settling a job twice changes nothing."""
        ...

    async def release(self, jobs: Sequence[Job], reason: str) -> None:
        """Gives jobs back that this worker can't do; another worker does them, or, where there is none, their
        callers get a 503.
        """
        ...

    async def close(self) -> None:
        """``take`` raises ``Closed`` once nothing is left that only this worker could take."""
        ...


class Queue(Producer, Consumer, Protocol):
    """Both sides in one process."""


class Closed(Exception):
    """The queue was closed and nothing is left to take."""
