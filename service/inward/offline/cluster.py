"""Ray, started here or joined: parts of some work, done by actors that each hold one copy of the model.

A part that an actor took down with it is done again by a fresh one, a few times; what was done before stays done. What
is wrong with the data or the model is handed over as a value, and raised here as it would be without Ray.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, TypeVar

from inward.errors import SetupError

IN_HAND = 2
"""Parts that an actor is given at once, so that it finds its next one ready."""
TRIES = 3
"""Actors that one part may take down."""
DEATHS = 16
"""Actors that may die with no part done in between; twice as many as there are, where that is more. Then it is not the
parts that they die of."""
ROOM = (
    "perhaps it runs out of memory. Give each more (fewer --actors on a machine, more --gpus), or take a smaller model "
    "or --dtype; Ray's logs say more. What is done is kept, and the same command goes on"
)
T = TypeVar("T")
Part = TypeVar("Part")


def add_arguments(parser: argparse._ActionsContainer, about: str) -> None:
    """``--engine`` with what ``ray`` does there, ``--actors`` and ``--gpus``."""
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help=about)
    add = parser.add_argument
    add("--actors", type=int, default=1, metavar="N", help="with --engine ray: how many models (default: 1)")
    add("--gpus", type=float, default=0.0, metavar="N", help="with --engine ray: GPUs for each actor (default: 0)")


class Worker(Protocol):
    """What an actor holds: a model, and what it does with it."""

    def do(self, part: Any) -> bytes:
        """One part of the work. A ``SetupError`` says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Died:
    """In place of what an actor makes of a part: as many as ``tries`` that began it died of it."""

    tries: int


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
        self._deaths = 0  # with no part done in between

    def __enter__(self) -> Self:
        if not self._ray.is_initialized():
            self._ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, logging_level="error")
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()

    def ask(self, question: Callable[..., T], *arguments: Any) -> T:
        """What ``question`` answers where there is a device for it.

        Raises:
            SetupError: the one that it raised there, or it took the process down ``TRIES`` times.
        """
        asked = self._ray.remote(num_gpus=self._gpus, max_retries=TRIES - 1)(_said)
        try:
            answer: T = _or_raise(self._ray.get(asked.remote(question, *arguments)))
        except self._ends as error:
            raise SetupError(f"the process that loads the model dies ({type(error).__name__}): {ROOM}") from error
        return answer

    def each(
        self,
        worker: Callable[..., Worker],
        arguments: Sequence[Any],
        parts: Sequence[Part],
        *,
        ordered: bool = False,
        tries: int = TRIES,
        alone: bool = False,
    ) -> Iterator[tuple[Part, bytes | Died]]:
        """What a ``worker(*arguments)`` makes of each part, as it comes or in the order of ``parts``.

        Args:
            ordered: a few results wait for one before them, and no more parts are begun until it is there.
            tries: actors that may die of one part, with nothing else in hand; then it is ``Died``.
            alone: an actor is never given a second part before it has done its first.

        Raises:
            SetupError: the one that a worker raised, or actors die whatever they are given.
        """
        crew = _Crew(self._ray, self._starter(worker, arguments), parts, tries, self._ends)
        crew.alone.update(range(len(parts)) if alone else ())
        copies = min(self._actors, len(parts))
        most_ahead = (IN_HAND + 1) * copies if ordered else len(parts)
        given = 0
        crew.hire(copies)
        while given < len(parts):
            crew.give(min(len(parts), given + most_ahead))
            made = crew.made
            error = crew.wait()
            if crew.made > made:
                self._deaths = 0
            if error is not None and not _taken_away(error):
                self._died(error)
            for place in crew.turns(given) if ordered else list(crew.done):
                try:
                    data = crew.collect(place)
                except self._ends:  # the machine on which it lay is gone
                    crew.lost(place)
                    break
                given += 1
                yield parts[place], data

    @property
    def _ends(self) -> tuple[type[Exception], ...]:
        """What Ray raises where a process, or the machine under it, is gone."""
        of = self._ray.exceptions
        return (
            of.RayActorError, of.WorkerCrashedError, of.OutOfMemoryError, of.NodeDiedError, of.LocalRayletDiedError,
            of.ObjectLostError,
        )  # fmt: skip

    def _died(self, error: Exception) -> None:
        self._deaths += 1
        if self._deaths >= max(DEATHS, 2 * self._actors):
            raise SetupError(
                f"{self._deaths} processes died one after the other, whatever they were given: {ROOM}"
            ) from error

    def _starter(self, worker: Callable[..., Worker], arguments: Sequence[Any]) -> Callable[[], Any]:
        """Starts an actor, which ends when nobody holds it any more."""
        actor = self._ray.remote(num_gpus=self._gpus, num_cpus=0 if self._gpus else 1)(_Actor)
        shared = self._ray.put(tuple(arguments))
        return lambda: actor.remote(worker, shared)


@dataclass(slots=True, eq=False)
class _Hand:
    """An actor, and what it was given, in the order in which it does that."""

    actor: Any
    ready: Any
    """Comes when it has loaded what it works with; None from then on."""
    places: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    """Of parts: what comes when it is done, an error of the worker or None, and what was made of it."""
    alone: bool = False
    """What it was given last is to be the only one."""

    def takes(self, alone: bool) -> bool:
        """Whether it has room for one more part, which may have to be the only one."""
        room = 1 if alone or self.alone else IN_HAND
        return self.ready is None and len(self.places) < room


class _Crew:
    """Some actors and the parts between them, by their places in ``parts``.

    Args:
        ends: what Ray raises where an actor, or the machine under it, is gone.
    """

    def __init__(
        self, ray: Any, start: Callable[[], Any], parts: Sequence[Any], tries: int, ends: tuple[type[Exception], ...]
    ) -> None:
        self.done: dict[int, Any] = {}
        """By place, and not collected yet: ``Died``, or where in Ray's store it lies."""
        self.alone: set[int] = set()
        """Places of parts that are given to an actor which has nothing else in hand, and gets nothing beside it."""
        self._ray, self._start, self._parts, self._tries, self._ends = ray, start, parts, tries, ends
        self.made = 0
        """Parts that were done, those done twice counted twice."""
        self._hands: list[_Hand] = []
        self._deaths: Counter[int] = Counter()
        self._again: list[int] = []
        self._sent = 0

    def hire(self, n: int) -> None:
        """Starts so many actors."""
        for _ in range(n):
            actor = self._start()
            self._hands.append(_Hand(actor, actor.__ray_ready__.remote()))

    def give(self, end: int) -> None:
        """Gives parts before ``end`` to actors that have room for them, first what has to be done again."""
        for _ in range(IN_HAND):
            for hand in self._hands:
                place = self._again[0] if self._again else self._sent
                if (self._again or place < end) and hand.takes(place in self.alone):
                    self._again = self._again[1:]
                    self._sent = max(self._sent, place + 1)
                    hand.alone = place in self.alone
                    hand.places[place] = hand.actor.do.options(num_returns=2).remote(self._parts[place])

    def wait(self) -> Exception | None:
        """Waits until something comes; where that is the death of an actor, what Ray says of it.

        Raises:
            SetupError: the one that a worker raised.
        """
        coming = {hand.ready: hand for hand in self._hands if hand.ready is not None}
        coming |= {said: hand for hand in self._hands for said, _ in hand.places.values()}
        (first,), _ = self._ray.wait(list(coming), num_returns=1)
        hand = coming[first]
        try:
            if first == hand.ready:
                self._ray.get(first)
                hand.ready = None
            else:
                place = next(place for place, (said, _) in hand.places.items() if said == first)
                _or_raise(self._ray.get(first))
                self._keep(place, hand.places.pop(place)[1])
        except self._ends as error:
            if getattr(error, "actor_init_failed", False):  # no death: it raised, and the next one would
                raise
            self._bury(hand)
            return error
        return None

    def turns(self, place: int) -> list[int]:
        """Places from ``place`` on that are done."""
        end = place
        while end in self.done:
            end += 1
        return list(range(place, end))

    def collect(self, place: int) -> bytes | Died:
        """What was made of a part, once. Raises what Ray does where it is lost."""
        result = self.done[place]
        data: bytes | Died = result if isinstance(result, Died) else self._ray.get(result)
        del self.done[place]
        return data

    def lost(self, place: int) -> None:
        """What was made of a part is gone."""
        del self.done[place]
        self._again.append(place)
        if not self._hands:
            self.hire(1)

    def _keep(self, place: int, result: Any) -> None:
        self.done[place] = result
        self.made += 1

    def _bury(self, hand: _Hand) -> None:
        """Of several parts in hand nobody knows which it died of, since it may have done one and not said so any more:
        each is given alone from then on.
        """
        self._hands.remove(hand)
        self._ray.kill(hand.actor)  # where it only can't be reached any more
        left: list[int] = []
        for place, (said, result) in hand.places.items():
            try:
                _or_raise(self._ray.get(said))
                self._keep(place, result)
            except self._ends as error:
                left.append(place)
                if hand.alone and not _taken_away(error):
                    self._deaths[place] += 1
        self.alone.update(left)
        for place in left:
            if self._deaths[place] < self._tries:
                self._again.append(place)
            else:
                self.done[place] = Died(self._tries)
        if self._again or self._sent < len(self._parts):
            self.hire(1)


def _taken_away(error: Exception) -> bool:
    """Whether the machine was, so that nobody died of anything."""
    return bool(getattr(error, "preempted", False))


class _Actor:
    def __init__(self, worker: Callable[..., Worker], arguments: Sequence[Any]) -> None:
        self._worker = _said(worker, *arguments)

    def do(self, part: Any) -> tuple[SetupError | None, bytes]:
        """What is wrong with a part, and what was made of it where nothing is: the first is small, and says that the
        second is there.
        """
        made = self._worker if isinstance(self._worker, SetupError) else _said(self._worker.do, part)
        return (made, b"") if isinstance(made, SetupError) else (None, made)


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
