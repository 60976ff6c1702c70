"""What the rest of the house may expect of a backbone."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from inward.types import BackboneInfo, Group, GroupReading, Ids, Reading, Readout, Sample


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
        self, group: Group, readouts: Sequence[Readout], *, tokens: bool = False
    ) -> tuple[list[Sample], GroupReading]:
        """``sample``, and ``read`` of what was drawn: in the pass that draws it where the backbone can, else after it.

        Equal samples are computed once, and read alike.

        Raises:
            EngineDead: the backbone can't compute any more.
        """
        ...

    def healthy(self) -> bool:
        """False once the backbone can't compute any more, also where its device makes no progress: calls in flight may
        never come back then.
        """
        ...

    async def close(self) -> None:
        """Gives the device back. Calls in flight finish first."""
        ...


async def read_samples(
    prompt_ids: Ids, samples: Sequence[Sample], read: Callable[[Group], Awaitable[GroupReading]]
) -> tuple[list[Sample], GroupReading]:
    """``Backbone.sample_and_read`` for a backbone that does one after the other: what ``read`` gives for the
    distinct samples, for all.
    """
    firsts = first_alike([sample.ids for sample in samples])
    distinct = sorted(set(firsts))
    reading = await read(Group(prompt_ids, tuple(samples[i].ids for i in distinct)))
    rows = [distinct.index(i) for i in firsts]
    readings = tuple(
        Reading(r.values_NK[rows], None if r.tokens_TK is None else tuple(r.tokens_TK[row] for row in rows))
        for r in reading.readings
    )
    return list(samples), replace(reading, readings=readings)


def first_alike(texts: Sequence[Ids]) -> list[int]:
    """For each text the index of the first one with the same ids."""
    seen: dict[Ids, int] = {}
    return [seen.setdefault(ids, i) for i, ids in enumerate(texts)]
