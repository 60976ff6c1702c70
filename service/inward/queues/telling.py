"""What is told of a job while it is drawn: the text of its one response, from tokens, on whatever thread they are
drawn, to pieces of text, not too many of them; or of several, each as it ends.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Self

from inward import logs
from inward.types import Ended, Ids, News, Piece, Sample

LOG = logs.logger("engine")
TELL_INTERVAL_S = 0.05
"""Between two pieces of one response: as often as a reader sees a difference, whatever the pace of drawing."""
Tell = Callable[[News], Awaitable[bool]]
"""Hands on news, see ``queues.base.Consumer.tell``."""
Rate = Callable[[int, Sample], Awaitable[Ended]]
"""What is to be told of the response of this number."""


class _Teller(ABC):
    """Tells of a job from entering this until leaving it."""

    _job_id: str

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._end()
        await self._task

    async def _run(self) -> None:
        try:
            await self._tell_on()
        except Exception as error:  # a defect of ours; the outcome has everything all the same
            logs.event(LOG, "telling_failed", severity=logging.ERROR, job=self._job_id, error=error)

    @abstractmethod
    async def _tell_on(self) -> None:
        """Tells what comes, until ``_end`` was called."""

    @abstractmethod
    def _end(self) -> None: ...


class Telling(_Teller):
    """Tells of one response, from entering this until leaving it: then what was told last has been handed on.

    Args:
        job_id: whose response it is.
        text: of its tokens so far, as much as may be given; every longer one begins with those before it.
        tell: what it could not hand on is told again.
    """

    def __init__(self, job_id: str, text: Callable[[Ids], str], tell: Tell) -> None:
        self._job_id, self._text, self._tell = job_id, text, tell
        self._loop = asyncio.get_running_loop()
        self._news, self._over = asyncio.Event(), asyncio.Event()
        self._ids: Ids = ()
        self._told = 0

    def on_tokens(self, ids: Ids) -> None:
        """See ``backbones.base.OnTokens``."""
        self._ids = ids
        self._loop.call_soon_threadsafe(self._news.set)

    def _end(self) -> None:
        self._over.set()
        self._news.set()

    async def _tell_on(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            if self._over.is_set():
                return
            await self._tell_news()
            with suppress(TimeoutError):
                async with asyncio.timeout(TELL_INTERVAL_S):
                    await self._over.wait()

    async def _tell_news(self) -> None:
        text = self._text(self._ids)
        if len(text) > self._told and await self._tell(Piece(self._job_id, self._told, text[self._told :])):
            self._told = len(text)


class TellingEnds(_Teller):
    """Tells of several responses, of each when it has ended for good, from entering this until leaving it. What was not
    handed on by then is not told: the outcome has it.

    Args:
        job_id: whose responses they are.
        final: whether a response that has ended by itself stays as it is.
        rate: what is told of one.
        tell: hands it on.
    """

    def __init__(self, job_id: str, final: Callable[[int], bool], rate: Rate, tell: Tell) -> None:
        self._job_id, self._final, self._rate, self._tell = job_id, final, rate, tell
        self._loop = asyncio.get_running_loop()
        self._ended: dict[int, Sample] = {}
        self._queue: asyncio.Queue[tuple[int, Sample] | None] = asyncio.Queue()
        self._over = False

    def on_ended(self, index: int, sample: Sample) -> None:
        """See ``backbones.base.OnEnded``."""
        self._ended[index] = sample
        self.look()

    def look(self) -> None:
        """Tells of those that are final now; called from where they are drawn."""
        for i in [i for i, one in self._ended.items() if not one.finished or self._final(i)]:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (i, self._ended.pop(i)))

    def _end(self) -> None:
        self._over = True
        self._queue.put_nowait(None)

    async def _tell_on(self) -> None:
        while (news := await self._queue.get()) is not None and not self._over:
            await self._tell(await self._rate(*news))
