"""Ray, started here or joined: numbered parts of some work, done by actors that each hold one copy of the model.

A part that an actor took down with it is done again by another; what was done before stays done.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np

from inward.errors import SetupError

NUMBER, DONE = "number", "done"
T = TypeVar("T")
Batch = dict[str, np.ndarray[Any, Any]]


class Cluster:
    """Ray, started here or joined at ``$RAY_ADDRESS``.

    Args:
        actors: how many copies of the model.
        gpus: for each of them.

    Raises:
        SetupError: Ray is not installed.
    """

    def __init__(self, *, actors: int, gpus: float) -> None:
        try:
            import ray
        except ImportError:
            raise SetupError("--engine ray needs Ray: pip install '.[ray]' in Inward's folder") from None
        self._ray, self._actors, self._gpus = ray, actors, gpus

    def __enter__(self) -> Self:
        if not self._ray.is_initialized():
            self._ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, logging_level="error")
        self._ray.data.DataContext.get_current().enable_progress_bars = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ray.shutdown()

    def ask(self, question: Callable[[], T]) -> T:
        """What ``question`` answers where there is a device for it."""
        answer: T = self._ray.get(self._ray.remote(num_gpus=self._gpus)(question).remote())
        return answer

    def each(self, actor: type, arguments: Sequence[Any], numbers: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """What an ``actor(*arguments)`` makes of each number, in no particular order."""
        if not numbers:
            return
        data = self._ray.data.from_items([{NUMBER: number} for number in numbers], override_num_blocks=len(numbers))
        done = data.map_batches(
            actor, batch_size=1, fn_constructor_args=tuple(arguments),
            num_gpus=self._gpus, compute=self._ray.data.ActorPoolStrategy(size=self._actors),
        )  # fmt: skip
        for row in done.iter_rows():
            yield int(row[NUMBER]), row[DONE]
