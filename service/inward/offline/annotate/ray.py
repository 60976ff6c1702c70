"""``inward annotate --engine ray``: the same chunks and the same code, for many GPUs and machines.

Actors read the input themselves, so it must lie where all machines see it; results come back to where the command runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack

from inward.offline.annotate.scorer import Annotator, OpenScorer, Scorer
from inward.offline.annotate.work import Chunk, Cursor, Done, do
from inward.offline.cluster import Cluster
from inward_client.rows import PairReader, Source


class AnnotateCluster(Cluster):
    """See ``offline.cluster``.

    Args:
        actors: how many copies of the model.
        gpus: for each of them.

    Raises:
        SetupError: Ray is not installed.
    """

    def __init__(
        self, opened: OpenScorer, sources: Sequence[Source], reader: PairReader, *, actors: int, gpus: float
    ) -> None:
        super().__init__(actors=actors, gpus=gpus)
        self._opened, self._sources, self._reader = opened, sources, reader

    def annotator(self) -> tuple[Annotator, int | None]:
        """Who annotates, and the tokens of one forward pass; asked where there is a device for it.

        Raises:
            SetupError: the model or its heads can't be loaded there.
        """
        opened = self._opened

        async def ask() -> tuple[Annotator, int | None]:
            async with opened() as scorer:
                return await scorer.annotator(), scorer.tokens

        return self.ask(lambda: asyncio.run(ask()))

    def work(self, todo: Sequence[Chunk], keep: Callable[[Chunk, Done], None]) -> None:
        """Does the chunks and keeps each as it comes, in no particular order."""
        by_number = {chunk.number: chunk for chunk in todo}
        arguments = (self._opened, self._sources, self._reader, by_number)
        for number, done in self.each(Actor, arguments, list(by_number)):
            keep(by_number[number], Done.decode(done))


class Actor:
    """One copy of the model, and a cursor of its own in the input."""

    def __init__(
        self, opened: OpenScorer, sources: Sequence[Source], reader: PairReader, by_number: dict[int, Chunk]
    ) -> None:
        self._reader, self._cursor, self._by_number = reader, Cursor(sources), by_number
        self._loop = asyncio.Runner()
        self._stack = AsyncExitStack()
        self._scorer: Scorer = self._loop.run(self._stack.enter_async_context(opened()))

    def do(self, number: int) -> bytes:
        """The results of a chunk."""
        chunk = self._by_number[number]
        return self._loop.run(do(self._scorer, self._reader, self._cursor.read(chunk))).encode()
