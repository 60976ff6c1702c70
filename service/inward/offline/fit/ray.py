"""``inward fit legend --engine ray``: pairs are read in blocks on a cluster, and their sums are put together here.

A block has whole prompts, and is read as a pass of its own: so its sums are the same wherever and whenever it is read.
They are added up in the order of the blocks, and so do not depend on the number of machines. What was added so far is
kept until the head is saved, one file whatever the number of pairs.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from inward.backbones.base import Backbone
from inward.errors import DataError, SetupError
from inward.heads.base import BackboneRef
from inward.offline.cluster import Cluster, Died
from inward.offline.data.pairs import Pair, data_hash, prompt_groups
from inward.offline.model import OpenModel, with_model
from inward.offline.states.model_pass import RowError
from inward.offline.states.moments import PairSums
from inward.offline.states.read import kept_pairs, length_difference, sum_pairs
from inward.offline.states.running_sums import RunningSums, SummedPairs
from inward.offline.states.saved import Origin, PairStates
from inward.prompts import Prompts
from inward.types import Doubles, Floats, Indices, Position

BLOCK_PAIRS = 256
"""About so many are read at once, and are lost with an actor."""
Tensors = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class About:
    """What the model is, as the cluster has it."""

    backbone: dict[str, Any]
    identity: str
    template: str
    depth: int
    width: int


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Some pairs of a fit, all of their prompts'."""

    rows_N: Indices
    kept_K: Indices
    """Those of ``rows_N`` whose states are kept, by their place in it."""


@dataclass(frozen=True, slots=True)
class Pass:
    """What is read of each pair."""

    layers: tuple[int, ...]
    position: Position
    scatter: bool

    async def of(self, backbone: Backbone, prompts: Prompts, pairs: Sequence[Pair], kept_K: Indices) -> Tensors:
        """Of a block, as tensors."""
        where: dict[str, Any] = {"layers": self.layers, "position": self.position, "final_norm": True}
        summed = await sum_pairs(backbone, prompts, pairs, **where, kept=kept_K, scatter=self.scatter, progress=False)
        tensors = {"states": np.stack([summed.kept.chosen_NLD, summed.kept.rejected_NLD])}
        for axis, sums in enumerate(summed.sums_L):
            tensors |= sums.tensors(f"{axis}.")
        return tensors


class SpreadPairs:
    """Pairs that are read on a cluster.

    Args:
        cluster: that is open.
        cache: folder for what is done; give the same one to go on after an interruption.

    Raises:
        SetupError: the model can't be loaded there.
        DataError: a row that can't be tokenised; nothing was read yet.
    """

    def __init__(
        self, cluster: Cluster, opened: OpenModel, pairs: Sequence[Pair], cache: Path, *, block: int = BLOCK_PAIRS
    ) -> None:
        self._cluster, self._opened, self._pairs, self._cache, self._block = cluster, opened, pairs, cache, block
        self._groups_N = prompt_groups(pair.prompt for pair in pairs)
        self._about, self._length_difference_N = cluster.ask(_about, opened, pairs)

    @property
    def depth(self) -> int:
        """Blocks of the model."""
        return self._about.depth

    def sums(self, layers: Sequence[int], position: Position, *, scatter: bool = True) -> SummedPairs:
        """As ``states.read.sum_pairs``; neither memory nor the disk grows with the pairs."""
        what, about = Pass(tuple(layers), position, scatter), self._about
        kept_N = np.sort(kept_pairs(self._groups_N, len(layers), about.width))
        blocks = blocks_of(self._groups_N, self._block, kept_N)
        kept_2KLD = np.empty((2, len(kept_N), len(layers), about.width), dtype=np.float32)
        checkpoint = self._cache / f"{self._key(what)}.safetensors"
        sums = RunningSums(len(layers), about.width, [(), ()], kept_2KLD, checkpoint, scatter=scatter)
        missing = [number for number in range(len(blocks)) if number not in sums.done]
        with sums.kept_on_failure():
            for number, data in self._each(what, blocks, missing):
                tensors, block = load(data), blocks[number]
                kept_2KLD[:, np.searchsorted(kept_N, block.rows_N[block.kept_K])] = tensors["states"]
                sums.merge([PairSums.from_tensors(tensors, f"{axis}.") for axis in range(len(layers))])
                sums.commit([number])
        sums.save()
        kept = self._pair_states(kept_2KLD, kept_N, layers, position)
        return SummedPairs(kept, self._groups_N, tuple(sums.finish()))

    def _pair_states(
        self, states_2KLD: Floats, rows_K: Indices, layers: Sequence[int], position: Position
    ) -> PairStates:
        about = self._about
        ref, data = BackboneRef(**about.backbone), data_hash(self._pairs)
        origin = Origin(position, about.depth in layers, ref, about.template, data)
        groups_K, difference_K = self._groups_N[rows_K], self._length_difference_N[rows_K]
        return PairStates(states_2KLD[0], states_2KLD[1], tuple(layers), groups_K, difference_K, origin)

    def _each(self, what: Pass, blocks: Sequence[Block], numbers: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        arguments = (self._opened, what, self._pairs, blocks)
        for number, data in self._cluster.each(Reader, arguments, numbers, ordered=True):
            if isinstance(data, Died):
                raise SetupError(self._deadly(blocks[number], data.tries))
            yield number, data

    def _deadly(self, block: Block, tries: int) -> str:
        """What to say of pairs that every process died of."""
        lengths_N = [len(str(pair.prompt)) + len(pair.chosen) + len(pair.rejected) for pair in self._pairs]
        longest = max(block.rows_N, key=lambda row: lengths_N[row])
        return (
            f"{tries} processes that read the pairs of rows {_ranges(block.rows_N + 1)} died, one after the other, "
            f"perhaps out of memory. The longest of them is row {longest + 1}, with {lengths_N[longest]:,} characters: "
            "shorten or take out what is too long, or give each actor more memory. What is read is kept, and the same "
            "command goes on with it as long as the rows are the same"
        )

    def _key(self, what: Pass) -> str:
        everything = [asdict(what), asdict(self._about), data_hash(self._pairs), self._block]
        return hashlib.sha256(json.dumps(everything).encode()).hexdigest()[:32]


class Reader:
    """An actor: one copy of the model."""

    def __init__(self, opened: OpenModel, what: Pass, pairs: Sequence[Pair], blocks: Sequence[Block]) -> None:
        self._what, self._pairs, self._blocks = what, pairs, blocks
        self._loop = asyncio.Runner()
        self._stack = AsyncExitStack()  # open for as long as the actor lives
        self._backbone, self._prompts = self._loop.run(self._stack.enter_async_context(opened()))

    def do(self, number: int) -> bytes:
        """The tensors of a block.

        Raises:
            DataError: a row that can't be tokenised, by its number among all pairs.
        """
        block = self._blocks[number]
        pairs = [self._pairs[row] for row in block.rows_N]
        try:
            tensors = self._loop.run(self._what.of(self._backbone, self._prompts, pairs, block.kept_K))
        except RowError as error:
            row = int(block.rows_N[error.row - 1]) + 1
            raise DataError(f"row {row}: {error.problem}", param=error.param) from error
        data: bytes = save(tensors)
        return data


def _about(opened: OpenModel, pairs: Sequence[Pair]) -> tuple[About, Doubles]:
    """Asked before anything is read: the model, and how much longer each pair's chosen response is."""

    async def ask(backbone: Backbone, prompts: Prompts) -> tuple[About, Doubles]:
        info = backbone.info
        about = About(BackboneRef.of(info).model_dump(), info.identity, prompts.template, info.layers, info.width)
        return about, length_difference(backbone, prompts, pairs)

    return with_model(opened, ask)


def blocks_of(groups_N: Indices, size: int, kept_N: Indices | None = None) -> list[Block]:
    """Blocks of about ``size`` pairs, whole prompts in the order in which they come first."""
    _, first_G, number_N = np.unique(groups_N, return_index=True, return_inverse=True)
    rows_N = np.argsort(first_G[number_N], kind="stable")
    ends = np.flatnonzero(np.diff(groups_N[rows_N])) + 1  # where another prompt begins
    cuts: list[int] = []
    for end in ends:
        if end - (cuts[-1] if cuts else 0) >= size:
            cuts.append(int(end))
    kept = np.isin(np.arange(len(groups_N)), np.arange(len(groups_N)) if kept_N is None else kept_N)
    return [Block(part, np.flatnonzero(kept[part])) for part in np.split(rows_N, cuts)]


def _ranges(rows_N: Indices) -> str:
    """Rows in order, neighbours as one range."""
    parts = np.split(np.sort(rows_N), np.flatnonzero(np.diff(np.sort(rows_N)) > 1) + 1)
    return ", ".join(f"{part[0]} to {part[-1]}" if len(part) > 1 else f"{part[0]}" for part in parts)
