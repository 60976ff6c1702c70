"""One linear probe a layer by cross-validation over prompts, the layer chosen without the responses it is judged on.

For every fold the layer is chosen by an inner cross-validation over the other folds: the probe that leaves out folds i
and j judges layers for i on j, and for j on i.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

from inward.errors import DataError
from inward.offline.data.pairs import Folds
from inward.offline.evaluate import statistics
from inward.offline.evaluate.examples import Examples
from inward.offline.evaluate.scoring import Judged
from inward.types import Doubles, Floats, Indices

Probe = Callable[[Floats, NDArray[np.bool_], Floats], Doubles]
"""Fits on states ``[N, D]`` and labels ``[N]``, scores other states ``[H, D]``."""
C = 10.0
"""Inverse regularisation of the logistic probe, for standardised states divided by sqrt(D), whose rows have length
near 1."""


@dataclass(frozen=True, slots=True, eq=False)
class Layerwise:
    """Held-out scores of every layer's probe."""

    layers: tuple[int, ...]
    scores_LM: Doubles
    chosen: tuple[int, ...]
    """For each fold the layer that the other folds choose."""
    folds: Folds

    def best(self) -> Judged:
        """Each response by the layer that was chosen without it."""
        scores_M = np.empty(self.scores_LM.shape[1])
        for layer, (_, held_out) in zip(self.chosen, self.folds, strict=True):
            scores_M[held_out] = self.at(layer)[held_out]
        return Judged(scores_M, layers=self.layers, layer_scores_LM=self.scores_LM)

    def at(self, layer: int) -> Doubles:
        """Held-out scores ``[M]`` of one layer."""
        return np.asarray(self.scores_LM[self.layers.index(layer)])


def cross_validate(examples: Examples, folds: Folds, probe: Probe, *, progress: bool = False) -> Layerwise:
    """Fits the probe at every layer, for every fold and for every two folds.

    Raises:
        DataError: fewer than three folds, so that no training fold is left to choose the layer by.
    """
    if len(folds) < 3:
        raise DataError(
            f"choosing a layer on training folds needs at least three folds (prompts), here there are {len(folds)}"
        )
    held = [held_out for _, held_out in folds]
    scores_LM = np.empty((len(examples.layers), len(examples)))
    inner_LF = np.zeros((len(examples.layers), len(folds)))
    for axis in tqdm(range(len(examples.layers)), desc="fit baselines", unit="layer", disable=not progress):
        states_MD = np.ascontiguousarray(examples.states_MLD[:, axis])

        def scored(train: Indices, rows: Indices, states_MD: Floats = states_MD) -> Doubles:
            safe_N = examples.safe_M[train]
            if safe_N.all() or not safe_N.any():
                return np.zeros(len(rows))
            return probe(states_MD[train], safe_N, states_MD[rows])

        for train, held_out in folds:
            scores_LM[axis, held_out] = scored(train, held_out)
        for i, j in combinations(range(len(folds)), 2):
            both = np.concatenate([held[i], held[j]])
            scores = scored(np.setdiff1d(np.arange(len(examples)), both), both)
            on_i, on_j = np.split(scores, [len(held[i])])
            inner_LF[axis, j] += _auc(on_i, examples.safe_M[held[i]])
            inner_LF[axis, i] += _auc(on_j, examples.safe_M[held[j]])
    chosen = tuple(examples.layers[axis] for axis in inner_LF.argmax(axis=0))
    return Layerwise(examples.layers, scores_LM, chosen, folds)


def mean_difference(train_ND: Floats, safe_N: NDArray[np.bool_], states_HD: Floats) -> Doubles:
    """Projection on the difference of class means, in standard deviations of the training rows, so that folds share
    a scale.
    """
    train = train_ND.astype(np.float64)
    direction_D = train[safe_N].mean(axis=0) - train[~safe_N].mean(axis=0)
    projected_N = train @ direction_D
    return np.asarray((states_HD @ direction_D - projected_N.mean()) / max(float(projected_N.std()), 1e-30))


def logistic(train_ND: Floats, safe_N: NDArray[np.bool_], states_HD: Floats) -> Doubles:
    """Strongly regularised logistic regression on standardised states; where D > N in the span of the rows, which
    loses nothing.
    """
    mean_D, scale_D = train_ND.mean(axis=0, dtype=np.float64), train_ND.std(axis=0, dtype=np.float64)
    scale_D = np.where(scale_D > 1e-6 * np.median(scale_D), scale_D, 1.0) * np.sqrt(train_ND.shape[1])
    train, other = ((x - mean_D) / scale_D for x in (train_ND, states_HD))
    n, d = train.shape
    if n < d:
        square, vectors = np.linalg.eigh(train @ train.T)
        kept = square > max(square[-1], 1e-30) * 1e-9
        basis_NR = vectors[:, kept] / np.sqrt(square[kept])
        train, other = vectors[:, kept] * np.sqrt(square[kept]), (other @ train.T) @ basis_NR
    model = LogisticRegression(C=C, max_iter=500)
    return np.asarray(model.fit(train, safe_N).decision_function(other), dtype=np.float64)


def _auc(scores_N: Doubles, safe_N: NDArray[np.bool_]) -> float:
    """Chance where a fold has one class only."""
    value = float(statistics.auc(scores_N, safe_N)(np.ones((1, len(safe_N))))[0]) if len(safe_N) else np.nan
    return value if np.isfinite(value) else 0.5
