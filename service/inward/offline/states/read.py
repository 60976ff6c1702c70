"""From texts to states: what comes before any fit, as whole states in memory or in a file, or as running sums."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from inward.backbones.base import Backbone
from inward.errors import DataError
from inward.heads.base import BackboneRef
from inward.offline.data.pairs import Pair, ResponseList, data_hash, prompt_groups, whole_prompts
from inward.offline.states.model_pass import Place, merge, pass_key, read_groups
from inward.offline.states.moments import Moments
from inward.offline.states.running_sums import RunningSums, SummedPairs
from inward.offline.states.saved import ListStates, PairStates
from inward.offline.states.stored import PairWriter, StoredPairs
from inward.prompts import Prompt, Prompts
from inward.types import Doubles, Floats, Group, Indices, Position, Readout, Tap

KEPT_PAIRS = 4000
"""Pairs whose states are kept beside running sums, to choose and judge by: more would narrow no choice."""
KEPT_BYTES = 2**30
"""Most memory that they may take."""


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
    groups, places = merge(prompts, _texts(pairs), backbone.capacity.tokens)
    readout = _readout(backbone, layers, position, final_norm)
    n = len(pairs)
    both = _Rows(2 * n, len(layers), backbone.info.width, [p[0] for p in places] + [p[1] for p in places])
    await read_groups(
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
    groups, places = merge(
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

    await read_groups(backbone, groups, readouts, deliver, cache=cache, progress=progress)
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
    groups, places = merge(prompts, _texts(pairs), backbone.capacity.tokens)
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

    await read_groups(backbone, groups, [readout], deliver, done=writer.done, commit=writer.commit, progress=progress)
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
    kept: Indices | None = None,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> SummedPairs:
    """Running sums of the states of pairs, and the states of some of the pairs: one pass, and memory does not grow.

    Args:
        most: pairs whose states are kept (whole prompts); fewer where ``KEPT_BYTES`` is less.
        kept: these pairs' instead, by their numbers.
        checkpoint: folder for the sums so far; give the same one to go on after an interruption.
    """
    groups, places = merge(prompts, _texts(pairs), backbone.capacity.tokens)
    readout = _readout(backbone, layers, position, final_norm)
    width = backbone.info.width
    groups_N = prompt_groups(pair.prompt for pair in pairs)
    index_N = kept_pairs(groups_N, len(layers), width, most) if kept is None else kept
    both = [p[0] for p in places], [p[1] for p in places]
    rows = _Rows(2 * len(index_N), len(layers), width, [side[i] for side in both for i in index_N])
    sums = RunningSums(
        len(layers),
        width,
        [_times(both[0], groups), _times(both[1], groups)],
        rows.states,
        checkpoint and checkpoint / f"{pass_key(backbone, groups, [readout])}.safetensors",
    )

    def deliver(group: int, arrays: list[Floats]) -> None:
        rows.fill(group, arrays[0])
        sums.add(group, arrays[0].reshape(-1, len(layers), width))

    with sums.kept_on_failure():
        await read_groups(backbone, groups, [readout], deliver, done=sums.done, commit=sums.commit, progress=progress)
    n = len(index_N)
    states = PairStates(
        rows.states[:n],
        rows.states[n:],
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
    groups, places = merge(prompts, rows, backbone.capacity.tokens)
    readout = _readout(backbone, layers, position, final_norm)
    width = backbone.info.width
    sums = RunningSums(
        len(layers),
        width,
        [_times([place for row in places for place in row], groups), [np.zeros(len(g.responses_ids)) for g in groups]],
        np.empty((0, len(layers), width), dtype=np.float32),
        checkpoint and checkpoint / f"{pass_key(backbone, groups, [readout])}.safetensors",
    )

    def deliver(group: int, arrays: list[Floats]) -> None:
        sums.add(group, arrays[0].reshape(-1, len(layers), width))

    with sums.kept_on_failure():
        await read_groups(backbone, groups, [readout], deliver, done=sums.done, commit=sums.commit, progress=progress)
    return tuple(one.moments for one in sums.finish())


def kept_pairs(groups_N: Indices, layers: int, width: int, most: int = KEPT_PAIRS) -> Indices:
    """Numbers of the pairs whose states are kept beside running sums."""
    return whole_prompts(groups_N, min(most, KEPT_BYTES // (8 * layers * width)))


def groups_of(backbone: Backbone, prompts: Prompts, pairs: Sequence[Pair]) -> tuple[list[Group], list[list[Place]]]:
    """Pairs as groups that the backbone takes, each prompt's distinct responses together; where each row's two are."""
    return merge(prompts, _texts(pairs), backbone.capacity.tokens)


def length_difference(backbone: Backbone, prompts: Prompts, pairs: Sequence[Pair]) -> Doubles:
    """``[N]``: tokens of the chosen response minus tokens of the rejected one; nothing is read.

    Raises:
        DataError: a row that can't be tokenised.
    """
    return _length_difference(*groups_of(backbone, prompts, pairs))


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


def _readout(backbone: Backbone, layers: Sequence[int], position: Position, final_norm: bool) -> Readout:
    depth = backbone.info.layers
    if not layers or len(set(layers)) < len(layers) or not all(0 <= k <= depth for k in layers):
        raise DataError(
            f"layers must be different numbers from 0 to {depth} for {backbone.info.name}; got {list(layers)}"
        )
    return Readout(tuple(Tap(k, position, final_norm=final_norm and k == depth) for k in layers))


def _reference(backbone: Backbone) -> BackboneRef:
    return BackboneRef(name=backbone.info.name, revision=backbone.info.revision, fingerprint=backbone.info.fingerprint)
