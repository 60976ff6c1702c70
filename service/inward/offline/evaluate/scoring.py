"""A head's scores from stored states: its taps evaluated in numpy, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from inward.errors import DataError
from inward.heads.base import Head
from inward.offline.evaluate.examples import Examples
from inward.offline.evaluate.statistics import Doubles
from inward.types import Floats, Reading, Tap


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """What one method says of the examples; higher is better."""

    scores_M: Doubles | None
    probability_M: Doubles | None = None
    """That a response is acceptable, where the method claims to know."""
    margin_P: Doubles | None = None
    """Of each comparison, for a method that knows differences only."""
    layers: tuple[int, ...] = ()
    layer_scores_LM: Doubles | None = None
    """Each layer's own score, where the method has one."""

    def margins(self, examples: Examples) -> Doubles:
        """``[P]``: score of the better response minus score of the worse one."""
        if self.scores_M is None:
            return np.empty(0) if self.margin_P is None else self.margin_P
        return np.asarray(self.scores_M[examples.pairs_P2[:, 0]] - self.scores_M[examples.pairs_P2[:, 1]])


def score(head: Head, examples: Examples) -> Judged:
    """Scores every list of the examples, as the service would.

    Raises:
        DataError: the states lack a layer, a position or the prompts' states that the head reads, or a score is not
            finite.
    """
    values_MK = np.concatenate([_evaluate(tap, examples) for tap in head.readout.taps], axis=1)
    own_layers = head.manifest.kind == "hybrid"
    details = frozenset({"layers"} if own_layers else ())
    scores_M, probability_M = np.full(len(examples), np.nan), np.full(len(examples), np.nan)
    layer_scores_LM = np.full((len(head.manifest.layers), len(examples)), np.nan)
    for rows in examples.members:
        said = head.score(Reading(values_MK[rows]), details=details)  # type: ignore[arg-type]
        scores_M[rows] = _doubles(said.scores_N)
        if said.probability_N is not None and not said.listwise:
            probability_M[rows] = _doubles(said.probability_N)
        if own_layers and said.layers_N is not None:
            layer_scores_LM[:, rows] = np.stack([_doubles(one.values) for one in said.layers_N], axis=1)
    if lost := int((~np.isfinite(scores_M)).sum()):
        raise DataError(
            f"head {head.manifest.name!r} gives {lost} of {len(examples)} responses no finite score: fit it again"
        )
    return Judged(
        scores_M,
        probability_M if np.isfinite(probability_M).all() else None,
        layers=head.manifest.layers if own_layers else (),
        layer_scores_LM=layer_scores_LM if own_layers else None,
    )


def score_folds(
    heads: Sequence[Head], folds: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]], examples: Examples
) -> Judged:
    """Each response by the head whose fold holds it out; ``folds`` are (training rows, held-out rows)."""
    parts = [score(head, examples) for head in heads]
    first = parts[0]
    scores_M = np.empty(len(examples))
    probability_M = np.empty(len(examples)) if all(p.probability_M is not None for p in parts) else None
    layer_scores_LM = None if first.layer_scores_LM is None else np.empty_like(first.layer_scores_LM)
    for part, (_, held_out) in zip(parts, folds, strict=True):
        assert part.scores_M is not None
        scores_M[held_out] = part.scores_M[held_out]
        if probability_M is not None and part.probability_M is not None:
            probability_M[held_out] = part.probability_M[held_out]
        if layer_scores_LM is not None and part.layer_scores_LM is not None:
            layer_scores_LM[:, held_out] = part.layer_scores_LM[:, held_out]
    return Judged(scores_M, probability_M, layers=first.layers, layer_scores_LM=layer_scores_LM)


def _evaluate(tap: Tap, examples: Examples) -> Floats:
    """``[M, K]``; a tap on the prompt gives each response its list's value."""
    if tap.layer not in examples.layers:
        raise DataError(
            f"the head reads layer {tap.layer}, the states hold layers {', '.join(map(str, examples.layers))}: extract "
            "it too"
        )
    if tap.position == "prompt" and examples.prompt_states_GLD is None:
        raise DataError(
            "the head reads the prompt, but states of pairs have none: evaluate it on --lists, or on --pairs with the "
            "model"
        )
    if tap.position not in ("prompt", examples.position):
        raise DataError(
            f"the head reads position {tap.position!r}, the states are of {examples.position!r}: extract them again"
        )
    axis = examples.layers.index(tap.layer)
    if tap.position == "prompt":
        assert examples.prompt_states_GLD is not None
        return _apply(tap, examples.prompt_states_GLD[:, axis])[examples.list_M]
    return _apply(tap, examples.states_MLD[:, axis])


def _apply(tap: Tap, states_ND: Floats) -> Floats:
    if tap.weight_DK is None:
        return states_ND
    if tap.weight_DK.shape[0] != states_ND.shape[1]:
        raise DataError(
            f"the head reads states of width {tap.weight_DK.shape[0]}, these are {states_ND.shape[1]} wide: another "
            "model's?"
        )
    values_NK = states_ND @ tap.weight_DK
    return values_NK if tap.bias_K is None else values_NK + tap.bias_K


def _doubles(values: Sequence[float | None]) -> Doubles:
    return np.array([np.nan if value is None else value for value in values])
