"""From texts to states: the pass through the backbone that comes before any fit.

Rows are merged first: a prompt is computed once for all its distinct responses, however many pairs they occur in. With
a cache folder every finished batch is kept, so that an extraction which was stopped goes on where it was.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, load_file, save, save_file
from tqdm import tqdm

from inward.backbones.base import Backbone
from inward.batching import within
from inward.errors import DataError, InvalidField, TooLarge
from inward.files import write
from inward.heads.base import BackboneRef
from inward.offline.data.pairs import Pair, ResponseList, data_hash, prompt_groups, whole_prompts
from inward.offline.states.moments import Doubles, Moments, PairSums, number_format
from inward.offline.states.saved import ListStates, PairStates
from inward.offline.states.stored import PairWriter, StoredPairs
from inward.prompts import Prompt, Prompts
from inward.types import Floats, Group, GroupReading, Ids, Position, Reading, Readout, Tap

LOG = logging.getLogger(__name__)
Place = tuple[int, int]
"""Which group, and which of its responses."""
KEPT_PAIRS = 4000
"""Pairs whose states are kept beside running sums, to choose and judge by: more would narrow no choice."""
KEPT_BYTES = 2**30
"""Most memory that they may take."""
BLOCK_ROWS = 512
"""Responses that are added to running sums at once."""
CHECKPOINT_S = 60.0
"""Between two checkpoints of running sums, at least."""


async def extract_pairs(
    backbone: Backbone,
    prompts: Prompts,
    pairs: Sequence[Pair],
    *,
    layers: Sequence[int],
    position: Position = "last",
    final_norm: bool = False,
    cache: Path | None = None,
    progress: bool = True,
) -> PairStates:
    """States of pairs at some layers. Text that is too long is truncated as when serving with ``truncate``, and a
    warning counts it.

    Args:
        layers: index k is the residual stream after k blocks.
        final_norm: read the backbone's last layer after its final norm.
        cache: folder for finished batches; give the same one to go on after an interruption.
        progress: show a bar.

    Raises:
        DataError: a row that can't be tokenised, or a layer that the backbone does not have.
    """
    groups, places = _merge(prompts, _texts(pairs), backbone.capacity.tokens)
    readout = _readout(backbone, layers, position, final_norm)
    n = len(pairs)
    both = _Rows(2 * n, len(layers), backbone.info.width, [p[0] for p in places] + [p[1] for p in places])
    await _read(
        backbone, groups, [readout], lambda group, arrays: both.fill(group, arrays[0]), cache=cache, progress=progress
    )
    return PairStates(
        both.states[:n],
        both.states[n:],
        tuple(layers),
        prompt_groups(pair.prompt for pair in pairs),
        _length_difference(groups, places),
        position,
        final_norm and backbone.info.layers in layers,
        _reference(backbone),
        prompts.template,
        data_hash(pairs),
    )


async def extract_lists(
    backbone: Backbone,
    prompts: Prompts,
    lists: Sequence[ResponseList],
    *,
    layers: Sequence[int],
    position: Position = "last",
    final_norm: bool = False,
    cache: Path | None = None,
    progress: bool = True,
) -> ListStates:
    """States of prompts (position ``prompt``) and of the responses to them (``position``); otherwise as
    ``extract_pairs``.
    """
    groups, places = _merge(
        prompts, [(one.prompt, [r.text for r in one.responses]) for one in lists], backbone.capacity.tokens
    )
    readouts = [_readout(backbone, layers, position, final_norm), _readout(backbone, layers, "prompt", final_norm)]
    candidates = _Rows(
        sum(map(len, places)), len(layers), backbone.info.width, [place for row in places for place in row]
    )
    first = _Rows(len(lists), len(layers), backbone.info.width, [(row[0][0], 0) for row in places])

    def deliver(group: int, arrays: list[Floats]) -> None:
        candidates.fill(group, arrays[0])
        first.fill(group, arrays[1][:1])

    await _read(backbone, groups, readouts, deliver, cache=cache, progress=progress)
    return ListStates(
        first.states,
        candidates.states,
        np.repeat(np.arange(len(lists)), [len(one.responses) for one in lists]),
        np.array([r.safe for one in lists for r in one.responses], dtype=np.bool_),
        tuple(layers),
        prompt_groups(one.prompt for one in lists),
        position,
        final_norm and backbone.info.layers in layers,
        _reference(backbone),
        prompts.template,
        data_hash(lists),
    )


async def store_pairs(
    backbone: Backbone,
    prompts: Prompts,
    pairs: Sequence[Pair],
    path: Path,
    *,
    layers: Sequence[int],
    position: Position = "last",
    final_norm: bool = False,
    progress: bool = True,
) -> StoredPairs:
    """As ``extract_pairs``, but into a file, so that memory does not grow with the rows.

    A file that was left unfinished for the same rows is gone on with.
    """
    groups, places = _merge(prompts, _texts(pairs), backbone.capacity.tokens)
    readout = _readout(backbone, layers, position, final_norm)
    shape = (len(pairs), len(layers), backbone.info.width)
    origin = {
        "position": position,
        "final_norm": final_norm and backbone.info.layers in layers,
        "backbone": _reference(backbone).model_dump(),
        "template": prompts.template,
        "data_hash": data_hash(pairs),
    }
    writer = PairWriter(
        path,
        shape,
        layers=layers,
        groups_N=prompt_groups(pair.prompt for pair in pairs),
        length_difference_N=_length_difference(groups, places),
        origin=origin,
    )
    wanted = _by_group(places)

    def deliver(group: int, arrays: list[Floats]) -> None:
        for row, side, response in wanted[group]:
            writer.put(row, chosen=side == 0, states_LD=arrays[0][response].reshape(shape[1:]))

    await _read(backbone, groups, [readout], deliver, done=writer.done, commit=writer.commit, progress=progress)
    return writer.close()


async def sum_pairs(
    backbone: Backbone,
    prompts: Prompts,
    pairs: Sequence[Pair],
    *,
    layers: Sequence[int],
    position: Position = "last",
    final_norm: bool = False,
    most: int = KEPT_PAIRS,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> SummedPairs:
    """Running sums of the states of pairs, and the states of some of the pairs: one pass, and memory does not grow.

    Args:
        most: pairs whose states are kept (whole prompts); fewer where ``KEPT_BYTES`` is less.
        checkpoint: folder for the sums so far; give the same one to go on after an interruption.
    """
    groups, places = _merge(prompts, _texts(pairs), backbone.capacity.tokens)
    readout = _readout(backbone, layers, position, final_norm)
    width = backbone.info.width
    groups_N = prompt_groups(pair.prompt for pair in pairs)
    index_N = whole_prompts(groups_N, min(most, KEPT_BYTES // (8 * len(layers) * width)))
    both = [p[0] for p in places], [p[1] for p in places]
    kept = _Rows(2 * len(index_N), len(layers), width, [side[i] for side in both for i in index_N])
    sums = RunningSums(
        len(layers),
        width,
        [_times(both[0], groups), _times(both[1], groups)],
        kept.states,
        checkpoint and checkpoint / f"{_key(backbone, groups, [readout])}.safetensors",
    )

    def deliver(group: int, arrays: list[Floats]) -> None:
        kept.fill(group, arrays[0])
        sums.add(group, arrays[0].reshape(-1, len(layers), width))

    with sums.kept_on_failure():
        await _read(backbone, groups, [readout], deliver, done=sums.done, commit=sums.commit, progress=progress)
    n = len(index_N)
    states = PairStates(
        kept.states[:n],
        kept.states[n:],
        tuple(layers),
        groups_N[index_N],
        _length_difference(groups, places)[index_N],
        position,
        final_norm and backbone.info.layers in layers,
        _reference(backbone),
        prompts.template,
        data_hash(pairs),
    )
    return SummedPairs(states, len(pairs), len(np.unique(groups_N)), tuple(sums.finish()))


async def sum_responses(
    backbone: Backbone,
    prompts: Prompts,
    rows: Sequence[tuple[Prompt, Sequence[str]]],
    *,
    layers: Sequence[int],
    position: Position = "last",
    final_norm: bool = False,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> tuple[Moments, ...]:
    """Mean and covariance of any responses' states at each layer, labelled or not; otherwise as ``sum_pairs``."""
    groups, places = _merge(prompts, rows, backbone.capacity.tokens)
    readout = _readout(backbone, layers, position, final_norm)
    width = backbone.info.width
    sums = RunningSums(
        len(layers),
        width,
        [_times([place for row in places for place in row], groups), [np.zeros(len(g.responses_ids)) for g in groups]],
        np.empty((0, len(layers), width), dtype=np.float32),
        checkpoint and checkpoint / f"{_key(backbone, groups, [readout])}.safetensors",
    )

    def deliver(group: int, arrays: list[Floats]) -> None:
        sums.add(group, arrays[0].reshape(-1, len(layers), width))

    with sums.kept_on_failure():
        await _read(backbone, groups, [readout], deliver, done=sums.done, commit=sums.commit, progress=progress)
    return tuple(one.moments for one in sums.finish())


@dataclass(frozen=True, slots=True, eq=False)
class SummedPairs:
    """What is left of pairs that were read once: sums over all of them, and some of them as they are."""

    kept: PairStates
    pairs: int
    prompts: int
    sums_L: tuple[PairSums, ...]

    def sums(self, axis: int) -> PairSums:
        """Of all pairs at one entry of ``kept.layers``."""
        return self.sums_L[axis]


class RunningSums:
    """Sums over responses as they come, group by group, of every layer; they outlive the process at a checkpoint."""

    def __init__(
        self, layers: int, width: int, times: Sequence[Sequence[Doubles]], kept: Floats, path: Path | None
    ) -> None:
        """Begins, or goes on from the checkpoint at ``path``.

        Args:
            times: of chosen and of rejected: for each group how often each of its responses is one.
            kept: what else is filled on the way and must outlive the process; filled from the checkpoint.
        """
        self.done: set[int] = set()
        self._times, self._kept, self._path = times, kept, path
        self._sums = [PairSums.empty(width, number_format(layers, width)) for _ in range(layers)]
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
            if self._path and self._pending:
                self._save(self._path)
            raise

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
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}")
        save_file(tensors, unfinished)
        unfinished.replace(path)
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


def groups_of(backbone: Backbone, prompts: Prompts, pairs: Sequence[Pair]) -> tuple[list[Group], list[list[Place]]]:
    """Pairs as groups that the backbone takes, each prompt's distinct responses together; where each row's two are."""
    return _merge(prompts, _texts(pairs), backbone.capacity.tokens)


def _texts(pairs: Sequence[Pair]) -> list[tuple[Prompt, Sequence[str]]]:
    return [(pair.prompt, (pair.chosen, pair.rejected)) for pair in pairs]


def _length_difference(groups: Sequence[Group], places: Sequence[Sequence[Place]]) -> Doubles:
    """``[N]``: tokens of the first response of each row minus tokens of its second."""
    lengths_N2 = np.array([[len(groups[g].responses_ids[r]) for g, r in row] for row in places], dtype=np.float64)
    return np.asarray(lengths_N2.reshape(-1, 2) @ np.array([1.0, -1.0]))


def _by_group(places: Sequence[Sequence[Place]]) -> dict[int, list[tuple[int, int, int]]]:
    """For each group: which row wants which of its responses, on which side."""
    wanted: dict[int, list[tuple[int, int, int]]] = {}
    for row, of_row in enumerate(places):
        for side, (group, response) in enumerate(of_row):
            wanted.setdefault(group, []).append((row, side, response))
    return wanted


def _times(places: Sequence[Place], groups: Sequence[Group]) -> list[Doubles]:
    """For each group how often each of its responses is meant by ``places``."""
    times = [np.zeros(len(group.responses_ids)) for group in groups]
    for group, response in places:
        times[group][response] += 1
    return times


class _Rows:
    """States ``[R, L, D]`` that are filled group by group; a response may be wanted in several rows."""

    def __init__(self, rows: int, layers: int, width: int, places: Sequence[Place]) -> None:
        self.states = np.empty((rows, layers, width), dtype=np.float32)
        self._wanted: dict[int, list[tuple[int, int]]] = {}
        for row, (group, response) in enumerate(places):
            self._wanted.setdefault(group, []).append((row, response))

    def fill(self, group: int, values_NK: Floats) -> None:
        for row, response in self._wanted.get(group, ()):
            self.states[row] = values_NK[response].reshape(self.states.shape[1:])


def _merge(
    prompts: Prompts, rows: Sequence[tuple[Prompt, Sequence[str]]], budget: int
) -> tuple[list[Group], list[list[Place]]]:
    """Tokenises, and merges rows with the same prompt into groups of at most ``budget`` tokens. Also: where each
    row's responses are.
    """
    responses: list[dict[Ids, int]] = []
    prompt_ids: list[Ids] = []
    room: list[int] = []
    open_group: dict[Ids, int] = {}
    seen: dict[tuple[Ids, Ids], Place] = {}
    places: list[list[Place]] = []
    cut = 0

    def place(prompt: Ids, response: Ids) -> Place:
        if (prompt, response) in seen:
            return seen[prompt, response]
        group = open_group.get(prompt)
        if group is None or room[group] < len(response) + 1:
            group = open_group[prompt] = len(prompt_ids)
            prompt_ids.append(prompt)
            responses.append({})
            room.append(budget - len(prompt))
        room[group] -= len(response) + 1
        responses[group][response] = len(responses[group])
        seen[prompt, response] = group, responses[group][response]
        return seen[prompt, response]

    for number, (prompt, texts) in enumerate(rows, start=1):
        try:
            grouped = prompts.group(prompt, texts, truncate=True)
        except (InvalidField, TooLarge) as error:
            raise DataError(f"row {number}: {error.param or 'text'}: {error.message}", param=error.param) from error
        cut += grouped.truncated
        places.append([place(grouped.group.prompt_ids, ids) for ids in grouped.group.responses_ids])
    if cut:
        LOG.warning("%d of %d rows were longer than the backbone takes and were truncated", cut, len(rows))
    return [Group(ids, tuple(each)) for ids, each in zip(prompt_ids, responses, strict=True)], places


async def _read(
    backbone: Backbone,
    groups: Sequence[Group],
    readouts: Sequence[Readout],
    deliver: Callable[[int, list[Floats]], None],
    *,
    cache: Path | None = None,
    done: Collection[int] = (),
    commit: Callable[[Sequence[int]], None] | None = None,
    progress: bool,
) -> None:
    """Reads every group once and hands its values (one ``[N, K]`` a readout) to ``deliver``.

    Args:
        cache: folder for finished batches.
        done: groups that are not read, since they were before.
        commit: is told of groups that were delivered.
    """
    kept = _Kept(cache / _key(backbone, groups, readouts), groups) if cache else None
    done = set(done)
    with tqdm(
        total=sum(group.tokens for group in groups),
        initial=sum(groups[g].tokens for g in done),
        desc="reading states",
        unit="token",
        unit_scale=True,
        disable=not progress,
    ) as bar:

        def take(batch: Sequence[int], arrays: list[list[Floats]]) -> None:
            for group, of_group in zip(batch, arrays, strict=True):
                deliver(group, of_group)
            if commit:
                commit(batch)
            done.update(batch)
            bar.update(sum(groups[g].tokens for g in batch))

        for batch, arrays in kept.finished() if kept else ():
            take(batch, arrays)

        def arrive(batch: Sequence[int], readings: Sequence[GroupReading]) -> None:
            arrays = [[reading.values_NK for reading in of_group.readings] for of_group in readings]
            if kept:
                kept.keep(batch, arrays)
            take(batch, arrays)

        await _each(backbone, groups, [g for g in range(len(groups)) if g not in done], readouts, arrive)


async def read_every_token(
    backbone: Backbone,
    groups: Sequence[Group],
    readouts: Sequence[Readout],
    deliver: Callable[[int, tuple[Reading, ...]], None],
    *,
    tokens: bool = True,
    progress: bool = True,
) -> None:
    """Reads every group once, at every token of its responses too, and hands its readings to ``deliver``."""
    total = sum(group.tokens for group in groups)
    with tqdm(total=total, desc="reading tokens", unit="token", unit_scale=True, disable=not progress) as bar:

        def arrive(batch: Sequence[int], readings: Sequence[GroupReading]) -> None:
            for group, reading in zip(batch, readings, strict=True):
                deliver(group, reading.readings)
                bar.update(groups[group].tokens)

        await _each(backbone, groups, range(len(groups)), readouts, arrive, tokens=tokens)


async def _each(
    backbone: Backbone,
    groups: Sequence[Group],
    wanted: Iterable[int],
    readouts: Sequence[Readout],
    arrive: Callable[[Sequence[int], Sequence[GroupReading]], None],
    *,
    tokens: bool = False,
) -> None:
    """Reads ``wanted`` groups in batches that the backbone takes, several at once."""
    longest_first = sorted(wanted, key=lambda group: -groups[group].tokens)  # what does not fit shows at once
    batches = within(longest_first, backbone.capacity.tokens, lambda group: groups[group].tokens)

    async def work() -> None:
        for batch in batches:
            arrive(batch, await backbone.read([groups[g] for g in batch], readouts, tokens=tokens))

    # One more than the backbone takes at once, so that it finds its next batch ready.
    workers = [asyncio.ensure_future(work()) for _ in range(backbone.capacity.concurrency + 1)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()


class _Kept:
    """Finished batches on disk, one file each, in a folder whose name stands for everything that the states depend
    on.
    """

    def __init__(self, folder: Path, groups: Sequence[Group]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._sizes = [len(group.responses_ids) for group in groups]

    def keep(self, batch: Sequence[int], arrays: Sequence[Sequence[Floats]]) -> None:
        tensors = {str(r): np.concatenate([of_group[r] for of_group in arrays]) for r in range(len(arrays[0]))}
        write(self._folder / f"{min(batch)}.safetensors", save({"groups": np.array(batch, dtype=np.int64), **tensors}))

    def finished(self) -> Iterator[tuple[list[int], list[list[Floats]]]]:
        for path in sorted(self._folder.glob("[0-9]*.safetensors")):
            try:
                tensors = load(path.read_bytes())
            except SafetensorError:  # by somebody else's hand: read these groups again
                LOG.warning("%s is damaged; its states are read again", path)
                continue
            batch = [int(g) for g in tensors.pop("groups")]
            ends = np.cumsum([self._sizes[g] for g in batch])[:-1]
            parts = [np.split(tensors[str(r)], ends) for r in range(len(tensors))]
            yield batch, [list(of_group) for of_group in zip(*parts, strict=True)]


def _key(backbone: Backbone, groups: Sequence[Group], readouts: Sequence[Readout]) -> str:
    taps = [[tap.layer, tap.position, tap.final_norm] for readout in readouts for tap in readout.taps]
    digest = hashlib.sha256(
        json.dumps([backbone.info.fingerprint, backbone.info.dtype, backbone.policy_version, taps]).encode()
    )
    for group in groups:
        digest.update(json.dumps([group.prompt_ids, group.responses_ids]).encode())
    return digest.hexdigest()[:32]


def _readout(backbone: Backbone, layers: Sequence[int], position: Position, final_norm: bool) -> Readout:
    depth = backbone.info.layers
    if not layers or len(set(layers)) < len(layers) or not all(0 <= k <= depth for k in layers):
        raise DataError(
            f"layers must be different numbers from 0 to {depth} for {backbone.info.name}; got {list(layers)}"
        )
    return Readout(tuple(Tap(k, position, final_norm=final_norm and k == depth) for k in layers))


def _reference(backbone: Backbone) -> BackboneRef:
    return BackboneRef(name=backbone.info.name, revision=backbone.info.revision, fingerprint=backbone.info.fingerprint)
