"""What heads say of texts, through a backbone, or of saved states, without one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from inward.backbones.base import Backbone
from inward.errors import DataError
from inward.heads.base import Head
from inward.offline.data.pairs import Pair
from inward.offline.states.model_pass import read_every_token
from inward.offline.states.read import groups_of
from inward.offline.states.stored import PairSource, blocks
from inward.prompts import Prompts
from inward.types import Doubles, Floats, Group, Position, Reading, Scores, Tap


async def score_groups(backbone: Backbone, groups: Sequence[Group], heads: Sequence[Head]) -> list[tuple[Scores, ...]]:
    """For each group what each head says of its responses, as the service would."""
    said: list[tuple[Scores, ...]] = [()] * len(groups)

    def deliver(group: int, readings: tuple[Reading, ...]) -> None:
        said[group] = tuple(head.score(reading) for head, reading in zip(heads, readings, strict=True))

    tokens = any(head.pools for head in heads)
    readouts = [head.readout for head in heads]
    await read_every_token(backbone, groups, readouts, deliver, tokens=tokens)
    return said


async def score_pairs(backbone: Backbone, prompts: Prompts, pairs: Sequence[Pair], heads: Sequence[Head]) -> Doubles:
    """``[H, 2N]``: each head's scores of the chosen and then of the rejected responses; NaN where there is none."""
    groups, places = groups_of(backbone, prompts, pairs)
    said = await score_groups(backbone, groups, heads)
    scores = [[said[group][h].scores_N[response] for group, response in places] for h in range(len(heads))]
    return np.array(scores, dtype=np.float64)


def score_states(states: PairSource, heads: Sequence[Head]) -> Doubles:
    """The same of saved states.

    Raises:
        DataError: a head reads what the states do not hold: another layer, another position, or every token.
    """
    for head in heads:
        check_readable(head, states.layers, states.origin.position, final_norm=states.origin.final_norm)
    n = len(states)
    scores_HM = np.empty((len(heads), 2 * n))
    for index, *sides in blocks(states):
        for side, states_NLD in enumerate(sides):
            for h, head in enumerate(heads):
                values_NK = np.concatenate(
                    [apply(tap, states_NLD[:, states.layers.index(tap.layer)]) for tap in head.readout.taps], axis=1
                )
                scores_HM[h, index + side * n] = np.array(head.score(Reading(values_NK)).scores_N, dtype=np.float64)
    return scores_HM


def check_readable(head: Head, layers: Sequence[int], position: Position, *, final_norm: bool) -> None:
    """Whether states of these layers and this position, of which the last layer was read after the final norm or not,
    are all that a head reads.

    Raises:
        DataError: they are not.
    """
    name = head.manifest.name
    if head.pools:
        raise DataError(
            f"head {name!r} pools the scores of every token, which saved states do not hold: give the texts"
        )
    for tap in head.readout.taps:
        if tap.layer not in layers:
            there = ", ".join(map(str, layers))
            raise DataError(f"head {name!r} reads layer {tap.layer}, the states hold layers {there}: extract it too")
        if tap.position not in ("prompt", position):
            raise DataError(
                f"head {name!r} reads position {tap.position!r}, the states are of {position!r}: extract them again"
            )
        if tap.final_norm != (final_norm and tap.layer == max(layers)):
            raise DataError(
                f"head {name!r} reads layer {tap.layer} {'after' if tap.final_norm else 'before'} the final norm, the "
                "states are of the other: extract them for this head"
            )


def apply(tap: Tap, states_ND: Floats) -> Floats:
    """A tap's numbers ``[N, K]`` of states that are there."""
    if tap.weight_DK is None:
        return states_ND
    if tap.weight_DK.shape[0] != states_ND.shape[1]:
        raise DataError(
            f"the head reads states of width {tap.weight_DK.shape[0]}, these are {states_ND.shape[1]} wide: another "
            "model's?"
        )
    values_NK = states_ND @ tap.weight_DK
    return values_NK if tap.bias_K is None else values_NK + tap.bias_K
