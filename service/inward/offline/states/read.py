"""From texts to states: the pass through the backbone that comes before any fit.

Rows are merged first: a prompt is computed once for all its distinct responses, however many pairs they occur in. With
a cache folder every finished batch is kept, so that an extraction which was stopped goes on where it was.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save
from tqdm import tqdm

from inward.backbones.base import Backbone
from inward.batching import within
from inward.errors import DataError, InvalidField, TooLarge
from inward.files import write
from inward.heads.base import BackboneRef
from inward.offline.data.pairs import Pair, ResponseList, data_hash, prompt_groups
from inward.offline.states.saved import ListStates, PairStates
from inward.prompts import Prompt, Prompts
from inward.types import Floats, Group, Ids, Position, Readout, Tap

LOG = logging.getLogger(__name__)
Place = tuple[int, int]
"""Which group, and which of its responses."""


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
    groups, places = _merge(
        prompts, [(pair.prompt, (pair.chosen, pair.rejected)) for pair in pairs], backbone.capacity.tokens
    )
    readout = _readout(backbone, layers, position, final_norm)
    n = len(pairs)
    both = _Rows(2 * n, len(layers), backbone.info.width, [p[0] for p in places] + [p[1] for p in places])
    await _read(
        backbone, groups, [readout], lambda group, arrays: both.fill(group, arrays[0]), cache=cache, progress=progress
    )
    lengths = np.array([[len(groups[g].responses_ids[r]) for g, r in row] for row in places], dtype=np.float64).reshape(
        n, 2
    )
    return PairStates(
        both.states[:n],
        both.states[n:],
        tuple(layers),
        prompt_groups(pair.prompt for pair in pairs),
        lengths[:, 0] - lengths[:, 1],
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
    cache: Path | None,
    progress: bool,
) -> None:
    """Reads every group once and hands its values (one ``[N, K]`` a readout) to ``deliver``."""
    kept = _Kept(cache / _key(backbone, groups, readouts), groups) if cache else None
    done: set[int] = set()
    with tqdm(
        total=sum(group.tokens for group in groups),
        desc="reading states",
        unit="token",
        unit_scale=True,
        disable=not progress,
    ) as bar:

        def take(batch: Sequence[int], arrays: list[list[Floats]]) -> None:
            for group, of_group in zip(batch, arrays, strict=True):
                deliver(group, of_group)
            done.update(batch)
            bar.update(sum(groups[g].tokens for g in batch))

        for batch, arrays in kept.finished() if kept else ():
            take(batch, arrays)
        left = (group for group in range(len(groups)) if group not in done)
        longest_first = sorted(left, key=lambda group: -groups[group].tokens)  # what does not fit shows at once
        batches = within(longest_first, backbone.capacity.tokens, lambda group: groups[group].tokens)

        async def work() -> None:
            for batch in batches:
                readings = await backbone.read([groups[g] for g in batch], readouts)
                arrays = [[reading.values_NK for reading in of_group.readings] for of_group in readings]
                if kept:
                    kept.keep(batch, arrays)
                take(batch, arrays)

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
