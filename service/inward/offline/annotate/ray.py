"""``inward annotate --engine ray``: the same chunks and the same code, for many GPUs and machines.

Actors read the input themselves, so it must lie where all machines see it; results come back to where the command runs.
A row that takes down every actor that reads it has an error of its own in the end; no other row has.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack

from inward.offline.annotate.scorer import Annotated, Annotator, OpenScorer, Scorer
from inward.offline.annotate.work import Chunk, Cursor, Done, do
from inward.offline.cluster import TRIES, Cluster, Died
from inward_client.rows import PairReader, Source

ALONE_TRIES = 2
"""Actors that may die of a row by itself; of some rows one is enough for them to be parted."""
DEADLY = (
    "every process that annotated this row died, of the row alone as well; perhaps it ran out of memory: shorten the "
    "row, or give each actor more"
)
Keep = Callable[[Chunk, Done], None]


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

    def work(self, todo: Sequence[Chunk], keep: Keep) -> None:
        """Does the chunks and keeps each as it comes, in no particular order; last those that actors died of."""
        died: list[Chunk] = []
        for chunk, done in self._each(todo):
            if isinstance(done, Died):
                died.append(chunk)
            else:
                keep(chunk, done)
        self._part(died, keep)

    def _part(self, died: Sequence[Chunk], keep: Keep) -> None:
        """Halves what actors died of, and what of that they die of again, until single rows are left."""
        whole = {chunk.number: _Whole(chunk) for chunk in died}

        def put(part: Chunk, done: Done) -> None:
            of = whole[part.number]
            of.put(part, done)
            if of.complete:
                keep(of.chunk, of.done())

        while died:
            halves: list[Chunk] = []
            for part in died:
                if part.rows == 1:
                    put(part, Done([Annotated(None, DEADLY)], None))
                else:
                    halves += part.halves()
            died = []
            tries = ALONE_TRIES if any(half.rows == 1 for half in halves) else 1
            for part, done in self._each(halves, tries, alone=True):
                if isinstance(done, Died):
                    died.append(part)
                else:
                    put(part, done)

    def _each(
        self, chunks: Sequence[Chunk], tries: int = TRIES, *, alone: bool = False
    ) -> Iterator[tuple[Chunk, Done | Died]]:
        arguments = (self._opened, self._sources, self._reader)
        for chunk, done in self.each(Actor, arguments, chunks, tries=tries, alone=alone):
            yield chunk, done if isinstance(done, Died) else Done.decode(done)


class _Whole:
    """A chunk that is done part by part."""

    def __init__(self, chunk: Chunk) -> None:
        self.chunk = chunk
        self._parts: dict[int, Done] = {}

    @property
    def complete(self) -> bool:
        return sum(len(done.rows) for done in self._parts.values()) == self.chunk.rows

    def put(self, part: Chunk, done: Done) -> None:
        self._parts[part.start] = done

    def done(self) -> Done:
        """All of its rows, in order."""
        parts = [done for _, done in sorted(self._parts.items(), key=lambda at: at[0])]
        return Done([row for done in parts for row in done.rows], next((done.by for done in parts if done.by), None))


class Actor:
    """One copy of the model, and a cursor of its own in the input."""

    def __init__(self, opened: OpenScorer, sources: Sequence[Source], reader: PairReader) -> None:
        self._reader, self._cursor = reader, Cursor(sources)
        self._loop = asyncio.Runner()
        self._stack = AsyncExitStack()
        self._scorer: Scorer = self._loop.run(self._stack.enter_async_context(opened()))

    def do(self, chunk: Chunk) -> bytes:
        """The results of a chunk."""
        return self._loop.run(do(self._scorer, self._reader, self._cursor.read(chunk))).encode()
