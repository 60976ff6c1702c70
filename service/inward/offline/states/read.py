"""From texts to states: what comes before any fit, as whole states in memory or in a file, or as running sums."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from inward.backbones.base import Backbone
from inward.errors import DataError
from inward.heads.base import BackboneRef
from inward.offline.data.pairs import Pair, ResponseList, data_hash, prompt_groups, whole_prompts
from inward.offline.states.model_pass import Place, by_group, merge, pass_key, read_groups
from inward.offline.states.moments import Moments, PairSums
from inward.offline.states.running_sums import RunningSums, SummedPairs
from inward.offline.states.saved import ListStates, Origin, PairStates
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
    groups, places = groups_of(backbone, prompts, pairs)
    readout = _readout(backbone, layers, position, final_norm)
    rows = _Rows(backbone, readout, places)
    await read_groups(
        backbone, groups, [readout], lambda group, arrays: rows.fill(group, arrays[0]), cache=cache, progress=progress
    )
    origin = _origin(backbone, prompts, readout, pairs)
    groups_N = prompt_groups(pair.prompt for pair in pairs)
    return rows.pairs(tuple(layers), groups_N, _length_difference(groups, places), origin)


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
    candidates = _Rows(backbone, readouts[0], [place for row in places for place in row])
    first = _Rows(backbone, readouts[1], [(row[0][0], 0) for row in places])

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
        _origin(backbone, prompts, readouts[0], lists),
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
    groups, places = groups_of(backbone, prompts, pairs)
    readout = _readout(backbone, layers, position, final_norm)
    shape = (len(pairs), len(layers), backbone.info.width)
    writer = PairWriter(
        path,
        shape,
        layers=layers,
        groups_N=prompt_groups(pair.prompt for pair in pairs),
        length_difference_N=_length_difference(groups, places),
        origin=_origin(backbone, prompts, readout, pairs),
        made_by=pass_key(backbone, groups, [readout]),
    )
    wanted = by_group(places)

    def deliver(group: int, arrays: list[Floats]) -> None:
        for row, response in wanted[group]:
            side, pair = divmod(row, len(pairs))
            writer.put(pair, chosen=side == 0, states_LD=arrays[0][response].reshape(shape[1:]))

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
    scatter: bool = True,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> SummedPairs:
    """Running sums of the states of pairs, and the states of some of the pairs: one pass, and memory does not grow.

    Args:
        most: pairs whose states are kept (whole prompts); fewer where ``KEPT_BYTES`` is less.
        kept: these pairs' instead, by their numbers.
        scatter: as ``RunningSums``'.
        checkpoint: folder for the sums so far; give the same one to go on after an interruption.
    """
    groups, places = groups_of(backbone, prompts, pairs)
    readout = _readout(backbone, layers, position, final_norm)
    n, groups_N = len(pairs), prompt_groups(pair.prompt for pair in pairs)
    index_N = kept_pairs(groups_N, len(layers), backbone.info.width, most) if kept is None else kept
    rows = _Rows(backbone, readout, [places[i] for i in (*index_N, *(index_N + n))])
    times = [_times(places[:n], groups), _times(places[n:], groups)]
    sums_L = await _sum(backbone, groups, readout, times, rows, checkpoint, scatter=scatter, progress=progress)
    origin = _origin(backbone, prompts, readout, pairs)
    difference_N = _length_difference(groups, places)[index_N]
    states = rows.pairs(tuple(layers), groups_N[index_N], difference_N, origin)
    return SummedPairs(states, groups_N, sums_L)


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
    times = [_times([place for row in places for place in row], groups), _times((), groups)]
    none = _Rows(backbone, readout, ())
    return tuple(
        one.moments for one in await _sum(backbone, groups, readout, times, none, checkpoint, progress=progress)
    )


def kept_pairs(groups_N: Indices, layers: int, width: int, most: int = KEPT_PAIRS) -> Indices:
    """Numbers of the pairs whose states are kept beside running sums."""
    return whole_prompts(groups_N, min(most, KEPT_BYTES // (8 * layers * width)))


def groups_of(backbone: Backbone, prompts: Prompts, pairs: Sequence[Pair]) -> tuple[list[Group], list[Place]]:
    """Pairs as groups that the backbone takes, each prompt's distinct responses together; and the places of the chosen
    responses, then of the rejected ones.
    """
    texts = [(pair.prompt, (pair.chosen, pair.rejected)) for pair in pairs]
    groups, places = merge(prompts, texts, backbone.capacity.tokens)
    return groups, [row[side] for side in (0, 1) for row in places]


def length_difference(backbone: Backbone, prompts: Prompts, pairs: Sequence[Pair]) -> Doubles:
    """``[N]``: tokens of the chosen response minus tokens of the rejected one; nothing is read.

    Raises:
        DataError: a row that can't be tokenised.
    """
    return _length_difference(*groups_of(backbone, prompts, pairs))


def _length_difference(groups: Sequence[Group], places: Sequence[Place]) -> Doubles:
    length_M = np.array([len(groups[group].responses_ids[response]) for group, response in places], dtype=np.float64)
    chosen_N, rejected_N = np.split(length_M, 2)
    return np.asarray(chosen_N - rejected_N)


def _times(places: Sequence[Place], groups: Sequence[Group]) -> list[Doubles]:
    """For each group how often each of its responses is meant by ``places``."""
    times = [np.zeros(len(group.responses_ids)) for group in groups]
    for group, response in places:
        times[group][response] += 1
    return times


async def _sum(
    backbone: Backbone,
    groups: Sequence[Group],
    readout: Readout,
    times: Sequence[Sequence[Doubles]],
    rows: _Rows,
    checkpoint: Path | None,
    *,
    scatter: bool = True,
    progress: bool,
) -> tuple[PairSums, ...]:
    """Sums of each layer; ``rows`` are filled on the way."""
    layers, width = len(readout.taps), backbone.info.width
    counted = hashlib.sha256(b"".join(one.tobytes() for side in times for one in side)).hexdigest()[:8]
    path = checkpoint and checkpoint / f"{pass_key(backbone, groups, [readout])}-{counted}.safetensors"
    sums = RunningSums(layers, width, times, rows.states, path, scatter=scatter)

    def deliver(group: int, arrays: list[Floats]) -> None:
        rows.fill(group, arrays[0])
        sums.add(group, arrays[0].reshape(-1, layers, width))

    with sums.kept_on_failure():
        await read_groups(backbone, groups, [readout], deliver, done=sums.done, commit=sums.commit, progress=progress)
    return tuple(sums.finish())


class _Rows:
    """States ``[R, L, D]`` of the responses at ``places``, filled group by group."""

    def __init__(self, backbone: Backbone, readout: Readout, places: Sequence[Place]) -> None:
        self.states = np.empty((len(places), len(readout.taps), backbone.info.width), dtype=np.float32)
        self._wanted = by_group(places)

    def fill(self, group: int, values_NK: Floats) -> None:
        for row, response in self._wanted.get(group, ()):
            self.states[row] = values_NK[response].reshape(self.states.shape[1:])

    def pairs(self, layers: tuple[int, ...], groups_N: Indices, difference_N: Doubles, origin: Origin) -> PairStates:
        """Of rows that are the chosen and then the rejected responses."""
        chosen_NLD, rejected_NLD = np.split(self.states, 2)
        return PairStates(chosen_NLD, rejected_NLD, layers, groups_N, difference_N, origin)


def _readout(backbone: Backbone, layers: Sequence[int], position: Position, final_norm: bool) -> Readout:
    depth = backbone.info.layers
    if not layers or len(set(layers)) < len(layers) or not all(0 <= k <= depth for k in layers):
        raise DataError(
            f"layers must be different numbers from 0 to {depth} for {backbone.info.name}; got {list(layers)}"
        )
    return Readout(tuple(Tap(k, position, final_norm=final_norm and k == depth) for k in layers))


def _origin(
    backbone: Backbone, prompts: Prompts, readout: Readout, rows: Sequence[Pair] | Sequence[ResponseList]
) -> Origin:
    final_norm = any(tap.final_norm for tap in readout.taps)
    ref = BackboneRef.of(backbone.info)
    return Origin(readout.taps[0].position, final_norm, ref, prompts.template, data_hash(rows))
