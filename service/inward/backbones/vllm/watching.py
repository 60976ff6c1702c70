"""Responses of one group that a ``Watch`` looks at while vLLM draws them.

What is read of their tokens is in the table already; where the watch wants to look, it is fetched from there for all of
them at once, between two steps. A response that ends is aborted, which frees its part of the cache.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from inward.backbones.base import OnEnded, OnTokens, Watch, stopped
from inward.backbones.vllm.engine import Engine
from inward.backbones.vllm.generation import Text
from inward.backbones.vllm.layout import ReadRequest
from inward.backbones.vllm.protocol import PEEK
from inward.types import Floats, Ids, Sample, Stop

Drawn = tuple[Sample, Text | None]
"""A response, and, if it was drawn to its end, where its rows are."""


@dataclass(frozen=True, slots=True)
class Told:
    """One response of which only the tokens are told."""

    on_tokens: OnTokens
    key: None = None

    def tell(self, drawn: Sequence[int]) -> None:
        """See ``generation.Progress``."""
        self.on_tokens(tuple(drawn))


@dataclass(slots=True, eq=False)
class Watched:
    """One response, and how much of it has been seen."""

    key: str
    news: Callable[[], None]
    due: Callable[[int, int], bool]
    on_tokens: OnTokens | None = None
    ids: Ids = ()
    seen: int = 0
    ended: bool = False
    task: asyncio.Task[tuple[Sample, Text]] | None = field(default=None)

    def tell(self, drawn: Sequence[int]) -> None:
        """See ``generation.Progress``. The last token drawn has not entered the model yet."""
        self.ids = tuple(drawn)
        if self.on_tokens is not None:
            self.on_tokens(self.ids)
        if self.due(self.seen, len(drawn) - 1):
            self.news()


class GroupWatch:
    """Draws a group under the eyes of ``watch``.

    Args:
        request: reads ``watch.readouts``, too.
        first: row of the first response token among a request's rows.
        keys: under which the rows of each response can be seen while it is drawn.
        on_tokens: is told of the tokens of a single response.
        on_ended: of each of several, when it has ended.
    """

    def __init__(
        self,
        engine: Engine,
        watch: Watch,
        request: ReadRequest,
        first: int,
        keys: Sequence[str],
        on_tokens: OnTokens | None = None,
        on_ended: OnEnded | None = None,
    ) -> None:
        self._engine, self._watch, self._first, self._on_ended = engine, watch, first, on_ended
        self._changed = asyncio.Event()
        self._responses = [Watched(key, self._changed.set, watch.due, on_tokens) for key in keys]
        self._stops: dict[int, Stop] = {}
        taps = [[request.columns[id(tap)] for tap in readout.taps] for readout in watch.readouts]
        own = [np.concatenate(columns) for columns in taps]
        self._columns = [int(column) for column in np.concatenate(own)]
        self._cuts = np.cumsum([len(columns) for columns in own])[:-1]

    async def draw(
        self, draw: Callable[[int, Watched], Coroutine[Any, Any, tuple[Sample, Text]]], decode: Callable[[Ids], str]
    ) -> list[Drawn]:
        """All responses; those that the watch ended as far as they may be given.

        Args:
            draw: begins one; it tells the ``Watched`` of its tokens.
        """
        looking = asyncio.ensure_future(self._look_on(decode))
        try:
            async with asyncio.TaskGroup() as group:
                for i, response in enumerate(self._responses):
                    response.task = group.create_task(draw(i, response))
                    response.task.add_done_callback(partial(self._end, response))
                group.create_task(self._until(looking))
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        finally:
            looking.cancel()
        return [self._drawn(i, response, decode) for i, response in enumerate(self._responses)]

    def _end(self, response: Watched, _: Any) -> None:
        response.ended = True
        self._changed.set()

    @staticmethod
    async def _until(looking: Awaitable[None]) -> None:
        await looking

    async def _look_on(self, decode: Callable[[Ids], str]) -> None:
        """Until all have ended and were seen to the end."""
        told: set[int] = set()
        while len(told) < len(self._responses):
            await self._changed.wait()
            self._changed.clear()
            ended = [i for i, r in enumerate(self._responses) if r.ended and i not in told]
            news = await self._fetch([i for i in range(len(self._responses)) if i not in told])
            told |= set(ended)
            stops = self._watch.look(news, ended)
            self._stops |= stops
            self._tell([*stops, *(i for i in ended if i not in self._stops)], decode)
            for i in stops:
                task = self._responses[i].task
                if task is not None and not task.done():
                    task.cancel()

    def _tell(self, responses: Sequence[int], decode: Callable[[Ids], str]) -> None:
        """Of those that have ended, or will at once."""
        if self._on_ended is None:
            return
        for i in responses:
            response = self._responses[i]
            whole = _whole(response.task)
            if i in self._stops:
                self._on_ended(i, stopped(whole.ids if whole else response.ids, self._stops[i], decode))
            elif whole is not None:
                self._on_ended(i, whole)

    async def _fetch(self, responses: Sequence[int]) -> dict[int, list[Floats]]:
        """What was not seen yet of these, for each of the watch's readouts."""
        shown = [self._responses[i] for i in responses]
        data, counts = await self._engine.rpc(
            PEEK, [r.key for r in shown], [self._first + r.seen for r in shown], self._columns
        )
        rows = np.frombuffer(data, np.float32).reshape(sum(counts), len(self._columns))
        news: dict[int, list[Floats]] = {}
        for i, own in zip(responses, np.split(rows, np.cumsum(counts)[:-1]), strict=True):
            response = self._responses[i]
            own = own[: max(self._length(response) - response.seen, 0)]
            if len(own):
                response.seen += len(own)
                news[i] = np.split(own, self._cuts, axis=1)
        return news

    @staticmethod
    def _length(response: Watched) -> int:
        """Tokens of it that are known to be its own; what was drawn beyond its end is not."""
        whole = _whole(response.task)
        return len(response.ids if whole is None else whole.ids)

    def _drawn(self, i: int, response: Watched, decode: Callable[[Ids], str]) -> Drawn:
        task = response.task
        assert task is not None
        if i not in self._stops:
            return task.result()
        ids = response.ids if task.cancelled() else task.result()[0].ids
        return stopped(ids, self._stops[i], decode), None


def _whole(task: asyncio.Task[tuple[Sample, Text]] | None) -> Sample | None:
    """What was drawn to its end."""
    ended = task is not None and task.done() and not task.cancelled() and task.exception() is None
    return task.result()[0] if task is not None and ended else None
