"""Linear probes, one a layer, fitted where there are far fewer rows than dimensions.

States are standardised and divided by sqrt(D), so that a row has length near 1 at every layer and width and one scale
of regularisation means the same everywhere. An L2-regularised linear model is a combination of its rows, so fitting
happens in coordinates on the span of the rows: as exact as in D dimensions and much cheaper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC

from inward.offline.states.saved import PairStates
from inward.types import Floats

Doubles = NDArray[np.float64]
Kind = Literal["least_squares", "logistic", "svm", "logistic_pairs"]


class Recipe(NamedTuple):
    """How probes are fitted: the kind of linear model, and C, the inverse strength of its L2 regularisation."""

    kind: Kind
    c: float


RECIPES = (
    *(Recipe("least_squares", c) for c in (1.0, 3.0, 10.0)),
    *(Recipe("logistic", c) for c in (10.0, 30.0)),
    *(Recipe("svm", c) for c in (0.3, 1.0, 3.0)),
    Recipe("logistic_pairs", 30.0),
)
"""What the warm start chooses from, by cross-validation."""


@dataclass(frozen=True, slots=True, eq=False)
class Standardisation:
    """Mean and standard deviation of every dimension of every layer, over chosen and rejected states together."""

    mean_LD: Floats
    scale_LD: Floats

    @classmethod
    def fit(cls, states: PairStates) -> Self:
        """In float64: float16 states reach norms whose squares overflow it. A dimension that never varies gets scale
        1.
        """
        both = np.concatenate([states.chosen_NLD, states.rejected_NLD])
        mean = both.mean(axis=0, dtype=np.float64)
        scale = np.stack([both[:, l].std(axis=0, dtype=np.float64) for l in range(both.shape[1])])
        floor = 1e-6 * np.median(scale, axis=1, keepdims=True)
        return cls(mean.astype(np.float32), np.where(scale > floor, scale, 1.0).astype(np.float32))

    def apply(self, states_NLD: Floats) -> Floats:
        return (states_NLD - self.mean_LD) / self.scale_LD


@dataclass(frozen=True, slots=True, eq=False)
class Coordinates:
    """Rows in an orthonormal basis of their span: the first N are chosen states, the next N the rejected ones."""

    points_LMR: Doubles
    """``[L, 2N, R]``, standardised and divided by sqrt(D)."""
    basis_LDR: Floats | None
    """None where there are more rows than dimensions: then the coordinates are the dimensions themselves."""

    @classmethod
    def of(cls, states: PairStates, standardisation: Standardisation) -> Self:
        z_MLD = standardisation.apply(np.concatenate([states.chosen_NLD, states.rejected_NLD]))
        z_MLD /= np.float32(np.sqrt(z_MLD.shape[2]))
        m, layers, d = z_MLD.shape
        if m >= d:
            return cls(z_MLD.transpose(1, 0, 2).astype(np.float64), None)
        points, basis = np.zeros((layers, m, m)), np.zeros((layers, d, m), dtype=np.float32)
        for l in range(layers):
            z_MD = np.ascontiguousarray(z_MLD[:, l])
            square, vectors = np.linalg.eigh((z_MD @ z_MD.T).astype(np.float64))
            kept = square > square[-1] * 1e-6
            length = np.sqrt(square[kept])
            points[l][:, kept] = vectors[:, kept] * length
            basis[l][:, kept] = z_MD.T @ (vectors[:, kept] / length).astype(np.float32)
        return cls(points, basis)

    @property
    def pairs(self) -> int:
        return len(self.points_LMR[0]) // 2

    def rows(self, index: NDArray[np.int64]) -> Doubles:
        """Points ``[L, 2n, R]`` of some of the pairs."""
        return self.points_LMR[:, np.concatenate([index, index + self.pairs])]

    def weight(self, u_LR: Doubles) -> Doubles:
        """``[L, D]``: the weights on standardised states that ``u_LR`` stands for."""
        if self.basis_LDR is None:
            return np.asarray(u_LR / np.sqrt(u_LR.shape[1]))
        return np.asarray(np.einsum("ldr,lr->ld", self.basis_LDR, u_LR) / np.sqrt(self.basis_LDR.shape[1]))


def labels(pairs: int) -> Doubles:
    """``[2N]``: 1 for the chosen states, then 0 for the rejected ones."""
    return np.concatenate([np.ones(pairs), np.zeros(pairs)])


def fit_probe(points_MR: Doubles, recipe: Recipe, seed: int = 0) -> Doubles:
    """The direction ``[R]`` of one layer's probe, of any length, without intercept.

    ``least_squares`` is ridge regression on the labels (a least-squares SVM), ``logistic`` and ``svm`` classify single
    responses, ``logistic_pairs`` classifies differences of a pair.
    """
    n = len(points_MR) // 2
    kind, c = recipe
    if kind == "least_squares":
        return _ridge(points_MR, labels(n) - 0.5, c)
    if kind == "logistic_pairs":
        difference = points_MR[:n] - points_MR[n:]
        rows, model = (
            np.concatenate([difference, -difference]),
            LogisticRegression(C=c, fit_intercept=False, max_iter=500),
        )
    else:
        rows = points_MR
        model = (
            LogisticRegression(C=c, max_iter=500)
            if kind == "logistic"
            else LinearSVC(C=c, max_iter=10_000, random_state=seed)
        )
    return np.asarray(model.fit(rows, labels(n)).coef_[0], dtype=np.float64)


def fit_probes(points_LMR: Doubles, recipe: Recipe, seed: int = 0) -> Doubles:
    """``fit_probe`` at every layer: ``[L, R]``."""
    return np.stack([fit_probe(points_MR, recipe, seed) for points_MR in points_LMR])


def mean_difference(points_LMR: Doubles) -> Doubles:
    """The baseline: chosen minus rejected, averaged, ``[L, R]``."""
    n = points_LMR.shape[1] // 2
    return np.asarray(points_LMR[:, :n].mean(axis=1) - points_LMR[:, n:].mean(axis=1))


def pair_accuracy(scores: Sequence[float] | Doubles) -> float:
    """Share of pairs whose chosen response scores higher (equal: half); ``scores`` are those of ``labels``."""
    s = np.asarray(scores)
    difference = s[: len(s) // 2] - s[len(s) // 2 :]
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())


def auc(scores: Sequence[float] | Doubles) -> float:
    """Area under the ROC curve of chosen responses against rejected ones, across pairs; ``scores`` as above."""
    s = np.asarray(scores)
    n = len(s) // 2
    return float((rankdata(s)[:n].sum() - n * (n + 1) / 2) / (n * n))


def _ridge(rows_MR: Doubles, target_M: Doubles, c: float) -> Doubles:
    """Minimises ``|Xw - y|^2 + |w|^2 / c`` with centred rows, on the smaller side."""
    x_MR = rows_MR - rows_MR.mean(axis=0)
    m, r = x_MR.shape
    if m < r:
        return np.asarray(x_MR.T @ np.linalg.solve(x_MR @ x_MR.T + np.eye(m) / c, target_M))
    return np.asarray(np.linalg.solve(x_MR.T @ x_MR + np.eye(r) / c, x_MR.T @ target_M))
