"""One pass through the backbone over many texts.

Rows are merged first: a prompt is computed once for all its distinct responses, however many pairs they occur in. With
a cache folder every finished batch is kept, so that a pass which was stopped goes on where it was.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save
from tqdm import tqdm

from inward.backbones.base import Backbone
from inward.batching import within
from inward.errors import DataError, InvalidField, TooLarge
from inward.files import write
from inward.prompts import Prompt, Prompts
from inward.types import Floats, Group, GroupReading, Ids, Reading, Readout

LOG = logging.getLogger(__name__)
Place = tuple[int, int]
"""Which group, and which of its responses."""


class RowError(DataError):
    """A row that can't be tokenised; rows count from 1."""

    def __init__(self, row: int, problem: str, *, param: str | None) -> None:
        super().__init__(f"row {row}: {problem}", param=param)
        self.row, self.problem = row, problem

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(RowError, self.row, self.problem, param=self.param), ()


def merge(
    prompts: Prompts, rows: Sequence[tuple[Prompt, Sequence[str]]], budget: int
) -> tuple[list[Group], list[list[Place]]]:
    """Tokenises, and merges rows with the same prompt into groups of at most ``budget`` tokens. Also: where each
    row's responses are.

    Raises:
        RowError: a row can't be tokenised.
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
            raise RowError(number, f"{error.param or 'text'}: {error.message}", param=error.param) from error
        cut += grouped.truncated
        places.append([place(grouped.group.prompt_ids, ids) for ids in grouped.group.responses_ids])
    if cut:
        LOG.warning("%d of %d rows were longer than the backbone takes and were truncated", cut, len(rows))
    return [Group(ids, tuple(each)) for ids, each in zip(prompt_ids, responses, strict=True)], places


def by_group(places: Iterable[Place]) -> dict[int, list[tuple[int, int]]]:
    """For each group which of ``places`` are in it, by their numbers, and which of its responses they are."""
    found: dict[int, list[tuple[int, int]]] = {}
    for number, (group, response) in enumerate(places):
        found.setdefault(group, []).append((number, response))
    return found


async def read_groups(
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
    kept = _Kept(cache / pass_key(backbone, groups, readouts), groups) if cache else None
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


def pass_key(backbone: Backbone, groups: Sequence[Group], readouts: Sequence[Readout]) -> str:
    """Stands for everything that the states of a pass depend on."""
    taps = [[tap.layer, tap.position, tap.final_norm] for readout in readouts for tap in readout.taps]
    digest = hashlib.sha256(
        json.dumps([backbone.info.fingerprint, backbone.info.dtype, backbone.policy_version, taps]).encode()
    )
    for group in groups:
        digest.update(json.dumps([group.prompt_ids, group.responses_ids]).encode())
    return digest.hexdigest()[:32]
