"""``inward fit legend --engine ray``: pairs are read in blocks on a cluster, and their sums are put together here.

A block has whole prompts, and is read as a pass of its own: so its sums are the same wherever and whenever it is read,
and those of all pairs, added up in the order of the blocks, do not depend on the number of machines. Blocks that are
done are kept until the head is saved.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from inward.backbones.base import Backbone
from inward.errors import SetupError
from inward.files import write
from inward.heads.base import BackboneRef
from inward.offline.cluster import DONE, NUMBER, Batch, Cluster
from inward.offline.data.pairs import Pair, data_hash, prompt_groups
from inward.offline.states.moments import PairSums, number_format
from inward.offline.states.read import extract_pairs, kept_pairs, sum_pairs
from inward.offline.states.running_sums import SummedPairs
from inward.offline.states.saved import Indices, PairStates
from inward.prompts import Prompts
from inward.types import Position

OpenModel = Callable[[], AbstractAsyncContextManager[tuple[Backbone, Prompts]]]
"""Opens the model, here or in another process: it can be pickled."""
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

    make: Literal["sums", "states"]
    layers: tuple[int, ...]
    position: Position

    async def of(self, backbone: Backbone, prompts: Prompts, pairs: Sequence[Pair], kept_K: Indices) -> Tensors:
        """Of a block, as tensors."""
        where: dict[str, Any] = {"layers": self.layers, "position": self.position, "final_norm": True}
        if self.make == "states":
            return _tensors(await extract_pairs(backbone, prompts, pairs, **where, progress=False))
        summed = await sum_pairs(backbone, prompts, pairs, **where, kept=kept_K, progress=False)
        tensors = _tensors(summed.kept)
        for axis, sums in enumerate(summed.sums_L):
            tensors |= sums.tensors(f"{axis}.")
        return tensors


class SpreadPairs:
    """Pairs that are read on a cluster.

    Args:
        cache: folder for blocks that are done; give the same one to go on after an interruption.
        actors: how many copies of the model.
        gpus: for each of them.

    Raises:
        SetupError: Ray is not installed, or the model can't be loaded there.
    """

    def __init__(
        self, opened: OpenModel, pairs: Sequence[Pair], cache: Path, *, actors: int, gpus: float,
        block: int = BLOCK_PAIRS,
    ) -> None:  # fmt: skip
        self._opened, self._pairs, self._cache, self._block = opened, pairs, cache, block
        self._groups_N = prompt_groups(pair.prompt for pair in pairs)
        self._cluster = Cluster(actors=actors, gpus=gpus)

    def __enter__(self) -> Self:
        self._cluster.__enter__()
        opened = self._opened

        async def ask() -> About | str:
            try:
                async with opened() as (backbone, prompts):
                    info = backbone.info
                    ref = BackboneRef(name=info.name, revision=info.revision, fingerprint=info.fingerprint)
                    return About(ref.model_dump(), info.identity, prompts.template, info.layers, info.width)
            except SetupError as error:
                return error.message

        answer = self._cluster.ask(lambda: asyncio.run(ask()))
        if isinstance(answer, str):
            raise SetupError(answer)
        self._about = answer
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cluster.__exit__(kind, error, trace)

    @property
    def depth(self) -> int:
        """Blocks of the model."""
        return self._about.depth

    def sums(self, layers: Sequence[int], position: Position) -> SummedPairs:
        """As ``states.read.sum_pairs``."""
        about = self._about
        kept_N = kept_pairs(self._groups_N, len(layers), about.width)
        blocks = blocks_of(self._groups_N, self._block, kept_N)
        done = self._done(Pass("sums", tuple(layers), position), blocks)
        total = [PairSums.empty(about.width, number_format(len(layers), about.width)) for _ in layers]
        for tensors in done:
            for axis, sums in enumerate(total):
                sums.merge(PairSums.from_tensors(tensors, f"{axis}."))
        rows_N = np.concatenate([block.rows_N[block.kept_K] for block in blocks])
        kept = self._together(done, rows_N, layers, position)
        return SummedPairs(kept, len(self._pairs), len(np.unique(self._groups_N)), tuple(total))

    def states(self, layers: Sequence[int], position: Position) -> PairStates:
        """As ``states.read.extract_pairs``."""
        blocks = blocks_of(self._groups_N, self._block)
        done = self._done(Pass("states", tuple(layers), position), blocks)
        return self._together(done, np.concatenate([block.rows_N for block in blocks]), layers, position)

    def _together(
        self, done: Sequence[Tensors], rows_N: Indices, layers: Sequence[int], position: Position
    ) -> PairStates:
        """The states that the blocks kept, in the order of the pairs."""
        order = np.argsort(rows_N, kind="stable")
        chosen, rejected, lengths = (
            np.concatenate([tensors[name] for tensors in done])[order] for name in ("chosen", "rejected", "lengths")
        )
        about = self._about
        return PairStates(
            chosen, rejected, tuple(layers), self._groups_N[rows_N[order]], lengths, position,
            about.depth in layers, BackboneRef(**about.backbone), about.template, data_hash(self._pairs),
        )  # fmt: skip

    def _done(self, what: Pass, blocks: Sequence[Block]) -> list[Tensors]:
        """Each block's tensors; those that an earlier run has kept are not made again."""
        folder = self._cache / self._key(what)
        files = [folder / f"{number}.safetensors" for number in range(len(blocks))]
        folder.mkdir(parents=True, exist_ok=True)
        missing = [number for number, file in enumerate(files) if not file.is_file()]
        for number, data in self._cluster.each(Reader, (self._opened, what, self._pairs, blocks), missing):
            write(files[number], data)
        return [load(file.read_bytes()) for file in files]

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

    def __call__(self, batch: Batch) -> dict[str, list[Any]]:
        """The tensors of the batch's blocks."""
        numbers = [int(number) for number in batch[NUMBER]]
        return {NUMBER: numbers, DONE: [self._read(self._blocks[number]) for number in numbers]}

    def _read(self, block: Block) -> bytes:
        pairs = [self._pairs[row] for row in block.rows_N]
        data: bytes = save(self._loop.run(self._what.of(self._backbone, self._prompts, pairs, block.kept_K)))
        return data


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


def _tensors(states: PairStates) -> Tensors:
    assert states.length_difference_N is not None
    return {
        "chosen": states.chosen_NLD, "rejected": states.rejected_NLD, "lengths": states.length_difference_N,
    }  # fmt: skip
