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
from inward.offline.annotate.asking import Annotator, MarginClient
from inward.offline.annotate.run import Job, Place
from inward.offline.annotate.work import Done
from inward.offline.data.files import Chunk, Cursor

CHUNKS = "chunk"
DONE = "done"


class Cluster:
    """Ray, started here or joined at ``$RAY_ADDRESS``.

    Args:
        actors: how many copies of the model.
        gpus: for each of them.

    Raises:
        SetupError: Ray is not installed.
    """

    def __init__(self, place: Place, job: Job, *, actors: int, gpus: float) -> None:
        try:
            import ray
        except ImportError:
            raise SetupError("--engine ray needs Ray: pip install 'inward[ray]'") from None
        self._ray, self._place, self._job, self._actors, self._gpus = ray, place, job, actors, gpus

    def __enter__(self) -> Self:
        if not self._ray.is_initialized():
            self._ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, logging_level="error")
        self._ray.data.DataContext.get_current().enable_progress_bars = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ray.shutdown()

    def annotator(self) -> Annotator:
        """Who annotates; asked where there is a device for it.

        Raises:
            SetupError: the model or its heads can't be loaded there.
        """
        place, task = self._place, self._job.task

        async def ask() -> dict[str, Any] | str:
            try:
                async with place.asker(task) as asker:
                    return asdict(await asker.annotator())
            except SetupError as error:
                return error.message

        answer = self._ray.get(self._ray.remote(num_gpus=self._gpus)(lambda: asyncio.run(ask())).remote())
        if isinstance(answer, str):
            raise SetupError(answer)
        return Annotator(**answer)

    def work(self, todo: Sequence[Chunk], keep: Callable[[Chunk, Done], None]) -> None:
        """Does the chunks and keeps each as it comes, in no particular order."""
        if not todo:
            return
        by_number = {chunk.number: chunk for chunk in todo}
        data = self._ray.data.from_items([{CHUNKS: chunk.number} for chunk in todo], override_num_blocks=len(todo))
        done = data.map_batches(
            Actor, batch_size=1, fn_constructor_args=(self._place, self._job), num_gpus=self._gpus,
            compute=self._ray.data.ActorPoolStrategy(size=self._actors),
        )  # fmt: skip
        for row in done.iter_rows():
            keep(by_number[row[CHUNKS]], Done.decode(row[DONE]))


class Actor:
    """One copy of the model, and a cursor of its own in the input."""

    def __init__(self, place: Place, job: Job) -> None:
        self._job, self._cursor = job, Cursor(job.sources)
        self._loop = asyncio.Runner()
        self._stack = AsyncExitStack()
        self._asker: MarginClient = self._loop.run(self._stack.enter_async_context(place.asker(job.task)))

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, list[Any]]:
        """The results of the batch's chunks."""
        numbers = [int(number) for number in batch[CHUNKS]]
        return {CHUNKS: numbers, DONE: [self._do(self._job.chunks[number]) for number in numbers]}

    def _do(self, chunk: Chunk) -> bytes:
        return self._loop.run(self._job.task.do(self._asker, self._cursor.read(chunk))).encode()
