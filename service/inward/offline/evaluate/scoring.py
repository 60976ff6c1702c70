"""A head's scores from stored states: its taps evaluated in numpy, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from inward.errors import DataError
from inward.heads.base import Head
from inward.heads.calibration import Deciles
from inward.offline.data.pairs import Folds
from inward.offline.evaluate.examples import Examples
from inward.offline.states.scores import apply, check_readable
from inward.types import Detail, Doubles, Floats, Reading, Scores, Tap


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
    check_readable(head, examples.layers, examples.position, final_norm=examples.final_norm)
    values_MK = np.concatenate([_evaluate(tap, examples) for tap in head.readout.taps], axis=1)
    own_layers = head.manifest.kind == "hybrid"
    details: frozenset[Detail] = frozenset({"layers"} if own_layers else ())
    said = [head.score(Reading(values_MK[rows]), details=details) for rows in examples.members]
    judged = of_texts(head, examples, said)
    if not own_layers:
        return judged
    layer_scores_LM = np.full((len(head.manifest.layers), len(examples)), np.nan)
    for rows, one in zip(examples.members, said, strict=True):
        for row, scores in zip(rows, one.layers_N or (), strict=False):
            layer_scores_LM[:, row] = np.array(scores.values, dtype=np.float64)
    return replace(judged, layers=head.manifest.layers, layer_scores_LM=layer_scores_LM)


def score_folds(heads: Sequence[Head], folds: Folds, examples: Examples) -> Judged:
    """Each response by the head whose fold holds it out.

    Scores of legend heads are in units of their own model's layer: each fold's are put on the scale of its calibration.
    """
    parts = [_comparable(head, score(head, examples)) for head in heads]
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


def of_texts(head: Head, examples: Examples, said: Sequence[Scores]) -> Judged:
    """What a head said of every list of the examples, in their order, when it read them through a backbone.

    Raises:
        DataError: a response has no finite score.
    """
    scores_M, probability_M = np.full(len(examples), np.nan), np.full(len(examples), np.nan)
    for rows, one in zip(examples.members, said, strict=True):
        scores_M[rows] = np.array(one.scores_N, dtype=np.float64)  # None is NaN
        if one.probability_N is not None and not one.listwise:
            probability_M[rows] = np.array(one.probability_N, dtype=np.float64)
    if lost := int((~np.isfinite(scores_M)).sum()):
        raise DataError(
            f"head {head.manifest.name!r} gives {lost} of {len(scores_M)} responses no finite score: fit it again"
        )
    return Judged(scores_M, probability_M if np.isfinite(probability_M).all() else None)


def _comparable(head: Head, judged: Judged) -> Judged:
    deciles = Deciles.load(head.manifest.calibration)
    if head.manifest.kind != "legend" or deciles is None or judged.scores_M is None:
        return judged
    spread = max(deciles.edges[-1] - deciles.edges[0], 1e-30)
    return replace(judged, scores_M=(judged.scores_M - deciles.edges[4]) / spread)


def _evaluate(tap: Tap, examples: Examples) -> Floats:
    """``[M, K]``; a tap on the prompt gives each response its list's value."""
    axis = examples.layers.index(tap.layer)
    if tap.position != "prompt":
        return apply(tap, examples.states_MLD[:, axis])
    if examples.prompt_states_GLD is None:
        raise DataError(
            "the head reads the prompt, but states of pairs have none: evaluate it on --lists, or on --pairs with the "
            "model"
        )
    return apply(tap, examples.prompt_states_GLD[:, axis])[examples.list_M]
