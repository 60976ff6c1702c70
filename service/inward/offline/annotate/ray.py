"""``inward annotate --engine ray``: the same chunks and the same code, on Ray Data, for many GPUs and machines.

Actors read the input themselves, so it must lie where all machines see it; results come back to where the command runs.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

import numpy as np

from inward.errors import SetupError
from inward.offline.annotate.scorer import Annotator, OpenScorer, Scorer
from inward.offline.annotate.work import Chunk, Cursor, Done, do
from inward_client.rows import PairReader, Source

NUMBER = "chunk"
DONE = "done"


class Cluster:
    """Ray, started here or joined at ``$RAY_ADDRESS``.

    Args:
        actors: how many copies of the model.
        gpus: for each of them.

    Raises:
        SetupError: Ray is not installed.
    """

    def __init__(
        self, opened: OpenScorer, sources: Sequence[Source], reader: PairReader, *, actors: int, gpus: float
    ) -> None:
        try:
            import ray
        except ImportError:
            raise SetupError("--engine ray needs Ray: pip install '.[ray]' in Inward's folder") from None
        self._ray, self._opened, self._sources, self._reader = ray, opened, sources, reader
        self._actors, self._gpus = actors, gpus

    def __enter__(self) -> Self:
        if not self._ray.is_initialized():
            self._ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, logging_level="error")
        self._ray.data.DataContext.get_current().enable_progress_bars = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ray.shutdown()

    def annotator(self) -> tuple[Annotator, int | None]:
        """Who annotates, and the tokens of one forward pass; asked where there is a device for it.

        Raises:
            SetupError: the model or its heads can't be loaded there.
        """
        opened = self._opened

        async def ask() -> tuple[dict[str, Any], int | None] | str:
            try:
                async with opened() as scorer:
                    return asdict(await scorer.annotator()), scorer.tokens
            except SetupError as error:
                return error.message

        answer = self._ray.get(self._ray.remote(num_gpus=self._gpus)(lambda: asyncio.run(ask())).remote())
        if isinstance(answer, str):
            raise SetupError(answer)
        return Annotator(**answer[0]), answer[1]

    def work(self, todo: Sequence[Chunk], keep: Callable[[Chunk, Done], None]) -> None:
        """Does the chunks and keeps each as it comes, in no particular order."""
        if not todo:
            return
        by_number = {chunk.number: chunk for chunk in todo}
        data = self._ray.data.from_items([{NUMBER: chunk.number} for chunk in todo], override_num_blocks=len(todo))
        done = data.map_batches(
            Actor, batch_size=1, fn_constructor_args=(self._opened, self._sources, self._reader, by_number),
            num_gpus=self._gpus, compute=self._ray.data.ActorPoolStrategy(size=self._actors),
        )  # fmt: skip
        for row in done.iter_rows():
            keep(by_number[row[NUMBER]], Done.decode(row[DONE]))


class Actor:
    """One copy of the model, and a cursor of its own in the input."""

    def __init__(
        self, opened: OpenScorer, sources: Sequence[Source], reader: PairReader, by_number: dict[int, Chunk]
    ) -> None:
        self._reader, self._cursor, self._by_number = reader, Cursor(sources), by_number
        self._loop = asyncio.Runner()
        self._stack = AsyncExitStack()
        self._scorer: Scorer = self._loop.run(self._stack.enter_async_context(opened()))

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, list[Any]]:
        """The results of the batch's chunks."""
        numbers = [int(number) for number in batch[NUMBER]]
        return {NUMBER: numbers, DONE: [self._do(self._by_number[number]) for number in numbers]}

    def _do(self, chunk: Chunk) -> bytes:
        return self._loop.run(do(self._scorer, self._reader, self._cursor.read(chunk))).encode()
