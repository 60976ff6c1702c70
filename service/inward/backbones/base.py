"""What the rest of the house may expect of a backbone."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from inward.errors import Unavailable
from inward.types import BackboneInfo, Floats, Group, GroupReading, Ids, Reading, Readout, Sample, Stop


@dataclass(frozen=True, slots=True)
class Capacity:
    """What one call may carry, declared by the backbone and obeyed by the packer."""

    tokens: int
    """Tokens to compute (``Group.tokens``, summed) in one call to ``read``. A single larger group is legal and goes
    alone."""
    concurrency: int = 1
    """Calls that are computed at once. One more may be in flight, so that the device finds its next batch ready."""
    drawings: int = 0
    """Calls that draw and may be in flight beside those, since they leave the device to others at every token; 0: they
    count as any other call."""


OnTokens = Callable[[Ids], None]
"""Takes in the tokens of a response while it is drawn: all so far, again and again, without what ends it. It is called
on the thread that draws, and returns at once."""
OnEnded = Callable[[int, Sample], None]
"""Takes in each response of a group, by index, when it has ended; again, if a watch then ends one that had ended by
itself. It is called where the watch looks, and returns at once."""


class Watch(Protocol):
    """Looks at the responses of one group while they are drawn, and says which of them end. What it says depends on
    their tokens alone, not on how many of them it is shown at once, nor in which order.
    """

    readouts: tuple[Readout, ...]
    """What it wants to see of every response token, whatever the positions of their taps."""
    guards: bool
    """Whether the finished responses have to pass ``check`` before they are given."""

    def due(self, seen: int, now: int) -> bool:
        """Whether it wants to look at a response that has ``now`` tokens, of which it has seen ``seen``."""
        ...

    def look(self, news: Mapping[int, Sequence[Floats]], ended: Iterable[int] = ()) -> dict[int, Stop]:
        """Takes in the next tokens of some responses; gives those that end. A later look may overrule an earlier one,
        and end one that has ended by itself.

        Args:
            news: for each of them, by index, the numbers of each of ``readouts``, ``[t, K]``.
            ended: those that have no further tokens.
        """
        ...

    def check(self, index: int, tokens: Sequence[Floats]) -> Stop | None:
        """Whether the finished response number ``index`` would have been ended by the guard, all of whose tokens are
        given.
        """
        ...


class Backbone(Protocol):
    """One base model, loaded once. ``read`` and ``sample`` may be awaited from one event loop; neither blocks it.

    Each call is computed wholly with the policy version that is carried when it begins.
    """

    info: BackboneInfo
    capacity: Capacity

    @property
    def policy_version(self) -> str:
        """What calls that begin now are computed with."""
        ...

    async def load_adapter(self, version: str, folder: Path | None) -> None:
        """Carries the LoRA adapter in ``folder`` (None: no adapter) as ``version`` from now on. Calls in flight finish
        with the former one.

        Raises:
            InvalidField: it is broken, or does not fit this model; what was carried before stays.
            EngineDead: the backbone can't compute any more.
        """
        ...

    async def read(
        self, groups: Sequence[Group], readouts: Sequence[Readout], *, tokens: bool = False
    ) -> list[GroupReading]:
        """Evaluates every readout on every group, one forward pass for all, each prompt computed once for its group.

        Args:
            groups: with ``responses_ids`` given (sampling is ignored), within ``capacity``.
            readouts: in the order in which ``GroupReading.readings`` come back.
            tokens: also give ``Reading.tokens_TK``.

        Raises:
            EngineDead: the backbone can't compute any more.
        """
        ...

    async def sample(self, group: Group) -> list[Sample]:
        """Draws ``group.sampling.n`` responses to ``group.prompt_ids``.

        Raises:
            EngineDead: the backbone can't compute any more.
        """
        ...

    async def sample_and_read(
        self,
        group: Group,
        readouts: Sequence[Readout],
        *,
        tokens: bool = False,
        watch: Watch | None = None,
        on_tokens: OnTokens | None = None,
        on_ended: OnEnded | None = None,
    ) -> tuple[list[Sample], GroupReading]:
        """``sample``, and ``read`` of what was drawn: in the pass that draws it where the backbone can, else after it.

        Equal samples are computed once, and read alike. What ``watch`` ends is not drawn further, and not read: its
        numbers are NaN. Of a group with one response ``on_tokens`` is told meanwhile; of one with several ``on_ended``,
        before their guard's last look.

        Raises:
            EngineDead: the backbone can't compute any more.
        """
        ...

    def certain(self, ids: Ids) -> str:
        """The text of the first tokens of a response as far as none that follows changes it: the text of the whole one
        begins with it.
        """
        ...

    @property
    def asleep(self) -> bool:
        """Whether it has lent its device to somebody else; calls raise Unavailable meanwhile."""
        ...

    async def sleep(self) -> None:
        """Gives the device's memory away, until ``wake``. Calls in flight finish first; sleeping twice changes nothing.

        Raises:
            Conflict: it can't, and why.
            EngineDead: the backbone can't compute any more.
        """
        ...

    async def wake(self) -> None:
        """Computes again, with the policy that it carried. Raises as ``sleep``."""
        ...

    def healthy(self) -> bool:
        """False once the backbone can't compute any more, also where its device makes no progress: calls in flight may
        never come back then.
        """
        ...

    async def close(self) -> None:
        """Gives the device back. Calls in flight finish first."""
        ...


def asleep() -> Unavailable:
    """What calls get from a backbone that sleeps."""
    return Unavailable("the backbone sleeps: POST /wake", retry_after=5.0)


async def read_samples(
    prompt_ids: Ids,
    samples: Sequence[Sample],
    readouts: Sequence[Readout],
    read: Callable[[Group], Awaitable[GroupReading]],
    policy_version: str,
) -> tuple[list[Sample], GroupReading]:
    """``Backbone.sample_and_read`` for a backbone that does one after the other: what ``read`` gives for the distinct
    finished samples, for all.
    """
    finished = [i for i, sample in enumerate(samples) if sample.finished]
    firsts = first_alike([samples[i].ids for i in finished])
    distinct = sorted(set(firsts))
    if not finished:
        return list(samples), spread(None, readouts, [None] * len(samples), policy_version)
    reading = await read(Group(prompt_ids, tuple(samples[finished[i]].ids for i in distinct)))
    rows: list[int | None] = [None] * len(samples)
    for i, first in zip(finished, firsts, strict=True):
        rows[i] = distinct.index(first)
    return list(samples), spread(reading, readouts, rows, reading.policy_version)


def spread(
    reading: GroupReading | None, readouts: Sequence[Readout], rows: Sequence[int | None], policy_version: str
) -> GroupReading:
    """What was read of some responses as that of all: of each the row of ``reading`` that it has; NaN and no tokens
    without one.
    """
    if reading is None:
        none = tuple(Reading(np.zeros((0, width(readout)), np.float32), ()) for readout in readouts)
        reading = GroupReading(none, 0, 0, policy_version)
    return replace(reading, readings=tuple(_spread(own, rows) for own in reading.readings))


def _spread(reading: Reading, rows: Sequence[int | None]) -> Reading:
    K = reading.values_NK.shape[1]
    values_NK = np.full((len(rows), K), np.nan, np.float32)
    for i, row in enumerate(rows):
        if row is not None:
            values_NK[i] = reading.values_NK[row]
    tokens = reading.tokens_TK
    if tokens is None:
        return Reading(values_NK)
    empty = np.zeros((0, K), np.float32)
    return Reading(values_NK, tuple(empty if row is None else tokens[row] for row in rows))


def width(readout: Readout) -> int:
    """How many numbers a readout gives, whose taps all have weights."""
    return sum(tap.weight_DK.shape[1] for tap in readout.taps if tap.weight_DK is not None)


def guarded(
    samples: Sequence[Sample], reading: GroupReading, watch: Watch | None, decode: Callable[[Ids], str]
) -> tuple[list[Sample], GroupReading]:
    """The last look: finished samples that the watch's guard does not let pass are cut, whether or not it saw all of
    their tokens while they were drawn. ``reading`` ends with the readings of the watch's own readouts, which are taken
    off, where it guards.
    """
    if watch is None or not watch.guards:
        return list(samples), reading
    own = len(reading.readings) - len(watch.readouts)
    checked = list(samples)
    for i, sample in enumerate(samples):
        tokens = [one.tokens_TK[i] for one in reading.readings[own:] if one.tokens_TK is not None]
        if sample.finished and (stop := watch.check(i, tokens)) is not None:
            checked[i] = stopped(sample.ids, stop, decode)
    kept = [i if sample.finished else None for i, sample in enumerate(checked)]
    return checked, spread(replace(reading, readings=reading.readings[:own]), (), kept, reading.policy_version)


def stopped(ids: Ids, stop: Stop, decode: Callable[[Ids], str]) -> Sample:
    """The sample that a watch has ended, of which these tokens were drawn. Half a character at its end is no text."""
    given = ids[: stop.given]
    text = decode(given).rstrip("\ufffd")
    score = stop.score if math.isfinite(stop.score) else None
    return Sample(given, text, stop.reason, stop_score=score, held_back=len(ids) - len(given))


def first_alike(texts: Sequence[Ids]) -> list[int]:
    """For each text the index of the first one with the same ids."""
    seen: dict[Ids, int] = {}
    return [seen.setdefault(ids, i) for i, ids in enumerate(texts)]
