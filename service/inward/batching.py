"""Waiting jobs → the next batch, and anything that costs tokens → batches, within a budget of tokens. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from inward.types import Job

T = TypeVar("T")


def within(things: Iterable[T], budget: int, cost: Callable[[T], int]) -> Iterator[list[T]]:
    """Cuts ``things``, in their order, into batches that cost at most ``budget``; a single one that costs more goes
    alone.
    """
    batch: list[T] = []
    spent = 0
    for thing in things:
        own = cost(thing)
        if batch and spent + own > budget:
            yield batch
            batch, spent = [], 0
        batch.append(thing)
        spent += own
    if batch:
        yield batch


def pack(waiting: Sequence[Job], budget: int) -> tuple[list[Job], list[Job]]:
    """The jobs of the next batch, and those that wait on; both in order of arrival.

    The oldest job is always in the batch, so nobody starves, even one that is larger than the budget (it goes alone).
    Jobs that sample go by themselves and one at a time: their cost is not one forward pass. Younger jobs fill what room
    is left.
    """
    batch: list[Job] = []
    rest: list[Job] = []
    spent = 0
    for job in waiting:
        fits = not batch or (spent + job.group.tokens <= budget and not _samples(job) and not _samples(batch[0]))
        (batch if fits else rest).append(job)
        spent += job.group.tokens if fits else 0
    return batch, rest


def _samples(job: Job) -> bool:
    return job.group.sampling is not None
