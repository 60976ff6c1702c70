"""Ray, started here or joined: numbered parts of some work, done by actors that each hold one copy of the model.

A part that an actor took down with it is done again; what was done before stays done. What is wrong with the data or
the model is handed over as a value, and raised here as it would be without Ray.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, Self, TypeVar

from inward.errors import SetupError

IN_HAND = 2
"""Parts that an actor is given at once, so that it finds its next one ready."""
T = TypeVar("T")


def add_arguments(parser: argparse._ActionsContainer, about: str) -> None:
    """``--engine`` with what ``ray`` does there, ``--actors`` and ``--gpus``."""
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help=about)
    add = parser.add_argument
    add("--actors", type=int, default=1, metavar="N", help="with --engine ray: how many models (default: 1)")
    add("--gpus", type=float, default=0.0, metavar="N", help="with --engine ray: GPUs for each actor (default: 0)")


class Worker(Protocol):
    """What an actor holds: a model, and what it does with it."""

    def do(self, number: int) -> bytes:
        """One part of the work. A ``SetupError`` says what is wrong with it."""


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
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()

    def ask(self, question: Callable[..., T], *arguments: Any) -> T:
        """What ``question`` answers where there is a device for it.

        Raises:
            SetupError: the one that it raised there.
        """
        asked = self._ray.remote(num_gpus=self._gpus)(_said)
        answer: T = _or_raise(self._ray.get(asked.remote(question, *arguments)))
        return answer

    def each(
        self, worker: Callable[..., Worker], arguments: Sequence[Any], numbers: Sequence[int], *, ordered: bool = False
    ) -> Iterator[tuple[int, bytes]]:
        """What a ``worker(*arguments)`` makes of each number, as it comes or in the order of ``numbers``.

        Args:
            ordered: a few results wait for one before them, and no more parts are begun until it is there.

        Raises:
            SetupError: the one that a worker raised.
        """
        copies = self._started(worker, arguments, min(self._actors, len(numbers)))
        most_ahead = (IN_HAND + 1) * len(copies) if ordered else len(numbers)
        busy = {copy.__ray_ready__.remote(): (copy, -1) for copy in copies}
        free: list[Any] = []
        done: dict[int, Any] = {}  # by place in numbers; they lie in Ray's store until it is their turn
        sent = given = 0
        while given < len(numbers):
            while free and sent < min(len(numbers), given + most_ahead):
                copy = free.pop(0)
                busy[copy.do.remote(numbers[sent])] = copy, sent
                sent += 1
            (result,), _ = self._ray.wait(list(busy), num_returns=1)
            copy, place = busy.pop(result)
            if place < 0:
                self._ray.get(result)
                free += [copy] * IN_HAND
                continue
            free.append(copy)
            done[place] = result
            for one in _turns(done, given) if ordered else [place]:
                data = _or_raise(self._ray.get(done.pop(one)))
                given += 1
                yield numbers[one], data

    def _started(self, worker: Callable[..., Worker], arguments: Sequence[Any], n: int) -> list[Any]:
        """Actors, which end when nobody holds them any more."""
        actor = self._ray.remote(
            num_gpus=self._gpus, num_cpus=0 if self._gpus else 1, max_restarts=-1, max_task_retries=-1
        )(_Actor)
        shared = self._ray.put(tuple(arguments))
        return [actor.remote(worker, shared) for _ in range(n)]


class _Actor:
    def __init__(self, worker: Callable[..., Worker], arguments: Sequence[Any]) -> None:
        self._worker = _said(worker, *arguments)

    def do(self, number: int) -> bytes | SetupError:
        return self._worker if isinstance(self._worker, SetupError) else _said(self._worker.do, number)


def _turns(done: dict[int, Any], place: int) -> list[int]:
    """Places from ``place`` on that are done."""
    end = place
    while end in done:
        end += 1
    return list(range(place, end))


def _said(question: Callable[..., T], *arguments: Any) -> T | SetupError:
    """The answer, or what is wrong: Ray would make a traceback of it."""
    try:
        return question(*arguments)
    except SetupError as error:
        return error


def _or_raise(answer: Any) -> Any:
    if isinstance(answer, SetupError):
        raise answer
    return answer
