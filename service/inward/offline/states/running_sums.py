"""Sums over responses while they are read: what a fit of any number of pairs needs, in memory that does not grow."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from inward.files import whole
from inward.offline.states.moments import PairSums, number_format
from inward.offline.states.saved import PairStates
from inward.types import Doubles, Floats, Indices

LOG = logging.getLogger(__name__)
BLOCK_ROWS = 512
"""Responses that are added to running sums at once."""
CHECKPOINT_S = 60.0
"""Between two checkpoints of running sums, at least."""


@dataclass(frozen=True, slots=True, eq=False)
class SummedPairs:
    """What is left of pairs that were read once: sums over all of them, and some of them as they are."""

    kept: PairStates
    groups_N: Indices
    """The prompt of each pair, of all of them."""
    sums_L: tuple[PairSums, ...]

    def sums(self, axis: int) -> PairSums:
        """Of all pairs at one entry of ``kept.layers``."""
        return self.sums_L[axis]


class RunningSums:
    """Sums over responses as they come, group by group, of every layer; they outlive the process at a checkpoint."""

    def __init__(
        self,
        layers: int,
        width: int,
        times: Sequence[Sequence[Doubles]],
        kept: Floats,
        path: Path | None,
        *,
        scatter: bool = True,
    ) -> None:
        """Begins, or goes on from the checkpoint at ``path``.

        Args:
            times: of chosen and of rejected: for each group how often each of its responses is one.
            kept: what else is filled on the way and must outlive the process; filled from the checkpoint.
            scatter: whether that of the responses is wanted, or means are enough.
        """
        self.done: set[int] = set()
        self._times, self._kept, self._path = times, kept, path
        number = number_format(layers, width) if scatter else None
        self._sums = [PairSums.empty(width, number) for _ in range(layers)]
        self._block: list[tuple[Floats, Doubles, Doubles]] = []
        self._pending: list[int] = []
        self._saved, self._saving_s = time.monotonic(), 0.0
        if path is not None and path.is_file():
            self._load(path)

    def add(self, group: int, states_NLD: Floats) -> None:
        """Adds a group; large blocks are what makes the matrix products fast."""
        chosen, rejected = self._times
        self._block.append((states_NLD, chosen[group], rejected[group]))
        if sum(len(states) for states, _, _ in self._block) >= BLOCK_ROWS:
            self._flush()

    def merge(self, sums_L: Sequence[PairSums]) -> None:
        """Adds what was summed elsewhere."""
        for sums, other in zip(self._sums, sums_L, strict=True):
            sums.merge(other)

    def commit(self, groups: Sequence[int]) -> None:
        """Takes note that these groups were added; writes a checkpoint now and then."""
        self._pending += groups
        if self._path and time.monotonic() - self._saved > max(CHECKPOINT_S, 20 * self._saving_s):
            self._save(self._path)

    @contextmanager
    def kept_on_failure(self) -> Iterator[None]:
        """What was added before something goes wrong, or somebody stops it, is kept."""
        try:
            yield
        except BaseException:
            self.save()
            raise

    def save(self) -> None:
        """Writes a checkpoint, if there is anything new."""
        if self._path and self._pending:
            self._save(self._path)

    def finish(self) -> list[PairSums]:
        """The sums of each layer."""
        self._flush()
        return self._sums

    def _flush(self) -> None:
        if self._block:
            states_MLD, chosen_M, rejected_M = (np.concatenate(parts) for parts in zip(*self._block, strict=True))
            for axis, sums in enumerate(self._sums):
                sums.add_responses(states_MLD[:, axis], chosen_M, rejected_M)
            self._block.clear()

    def _save(self, path: Path) -> None:
        started = time.monotonic()
        self._flush()
        self.done.update(self._pending)
        self._pending.clear()
        tensors = {"done": np.array(sorted(self.done), dtype=np.int64), "kept": self._kept}
        for axis, sums in enumerate(self._sums):
            tensors |= sums.tensors(f"{axis}.")
        with whole(path) as file:
            save_file(tensors, file)
        self._saved = time.monotonic()
        self._saving_s = self._saved - started

    def _load(self, path: Path) -> None:
        try:
            tensors = load_file(path)
            self._sums = [PairSums.from_tensors(tensors, f"{axis}.") for axis in range(len(self._sums))]
            self._kept[:] = tensors["kept"]
            self.done = {int(group) for group in tensors["done"]}
        except (SafetensorError, KeyError, ValueError):
            LOG.warning("%s is damaged; its sums are made again", path)
