"""Linear probes of single layers: what they see, how they are judged, and the closed form that a hybrid starts from.

States are standardised; where a set is small they are rotated into the span of its rows, which loses nothing and is
cheaper. The probe of a layer is the whitened direction (``whitening``) of its standardised states, the same as ridge
regression on the labels, so that running sums are all it takes: of every fold, for a probe that has not seen it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.stats import rankdata

from inward.offline.states.moments import PairSums
from inward.offline.states.stored import PairSource, blocks
from inward.types import Doubles, Floats, Indices

SHRINKAGE = (0.3, 1.0, 3.0, 10.0, 30.0)
"""The c that are tried: lambda as a multiple of the mean variance of a standardised dimension."""
_ROWS_BYTES = 256 * 2**20
"""States of one layer that are held while its sums are made; more are read again."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerProbes:
    """One layer's probes for every run: those without fold 0, 1, … K - 1, and the one of all pairs.

    Features are standardised states, or, with ``basis_DR``, their coordinates in the span of the rows.
    """

    mean_D: Floats
    scale_D: Floats
    basis_DR: Floats | None
    points_MR: Floats | None
    """All rows' features, chosen then rejected, where there is a basis."""
    probe_FCR: Floats
    """For each run and c: outputs have standard deviation 1 on the run's own rows."""
    bias_FC: Floats
    """And mean 0."""
    held_out_CM: Doubles
    """Outputs of the probes on the rows that they have not seen."""
    difference_M: Doubles
    """The same of the mean difference."""

    def tensors(self) -> dict[str, NDArray[Any]]:
        """To be kept in a file."""
        none = np.empty((0, 0), dtype=np.float32)
        return {
            name: none if (value := getattr(self, name)) is None else np.ascontiguousarray(value)
            for name in self.__dataclass_fields__
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, NDArray[Any]]) -> LayerProbes:
        """The other way round."""
        return cls(**{name: tensors[name] if tensors[name].size else None for name in cls.__dataclass_fields__})  # type: ignore[arg-type]


def fit_layer(
    source: PairSource, axis: int, fold_N: Indices, folds: int, shrinkage: Sequence[float], *, span: bool
) -> LayerProbes:
    """Fits one layer's probes.

    Args:
        axis: which entry of ``source.layers``.
        fold_N: the fold of each pair, 0 to ``folds`` - 1; all pairs of a prompt are in one.
        span: rotate into the span of the rows: for fewer rows than dimensions.
    """
    rows = _Rows(source, axis)
    if span:
        return _in_span(rows, fold_N, folds, shrinkage)
    parts = [PairSums.empty(source.width) for _ in range(folds)]
    for index, chosen_ND, rejected_ND in rows:
        for k, part in enumerate(parts):
            own = fold_N[index] == k
            part.add(chosen_ND[own], rejected_ND[own])
    whole = _merged(parts)
    mean_D = whole.moments.mean_D.astype(np.float32)
    scale_D = floored(np.sqrt(np.maximum(np.diag(whole.moments.covariance_DD), 0)))
    probe_FCD, bias_FC = _solve(parts, whole, mean_D, scale_D, source.width, shrinkage)
    held_out_CM = np.empty((len(shrinkage) + 1, 2 * len(source)))
    for index, chosen_ND, rejected_ND in rows:
        for k in range(folds):
            own = fold_N[index] == k
            for side, states_ND in enumerate((chosen_ND, rejected_ND)):
                z_ND = (states_ND[own] - mean_D) / scale_D
                held_out_CM[:, index[own] + side * len(source)] = (z_ND @ probe_FCD[k].T + bias_FC[k]).T
    return LayerProbes(
        mean_D, scale_D, None, None, probe_FCD[:, :-1], bias_FC[:, :-1], held_out_CM[:-1], held_out_CM[-1]
    )


def labels(pairs: int) -> Doubles:
    """``[2N]``: 1 for the chosen states, then 0 for the rejected ones."""
    return np.concatenate([np.ones(pairs), np.zeros(pairs)])


def both(index: Indices, pairs: int) -> Indices:
    """Rows of the chosen and then of the rejected responses of some pairs."""
    return np.concatenate([index, index + pairs])


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


def floored(scale_D: Doubles) -> Floats:
    """Standard deviations to divide by: a dimension that never varies gets 1."""
    return np.where(scale_D > 1e-6 * np.median(scale_D), scale_D, 1.0).astype(np.float32)


class _Rows:
    """One layer's rows, block by block, as often as wanted; kept if they are few."""

    def __init__(self, source: PairSource, axis: int) -> None:
        self.source, self._axis = source, axis
        few = 8 * len(source) * source.width <= _ROWS_BYTES
        self._kept = list(self._read()) if few else None

    def __iter__(self) -> Iterator[tuple[Indices, Floats, Floats]]:
        return iter(self._kept) if self._kept is not None else self._read()

    def _read(self) -> Iterator[tuple[Indices, Floats, Floats]]:
        for index, chosen, rejected in blocks(self.source, [self._axis]):
            yield index, chosen[:, 0], rejected[:, 0]


def _in_span(rows: _Rows, fold_N: Indices, folds: int, shrinkage: Sequence[float]) -> LayerProbes:
    parts = list(rows)
    chosen_ND, rejected_ND = (np.concatenate([part[side] for part in parts]) for side in (1, 2))
    x_MD = np.concatenate([chosen_ND, rejected_ND])
    n, width = len(chosen_ND), x_MD.shape[1]
    mean_D = x_MD.mean(axis=0, dtype=np.float64).astype(np.float32)
    scale_D = floored(x_MD.std(axis=0, dtype=np.float64))
    z_MD = (x_MD - mean_D) / scale_D
    square_M, vectors_MM = np.linalg.eigh((z_MD @ z_MD.T).astype(np.float64))
    kept = square_M > square_M[-1] * 1e-6
    length_R = np.sqrt(square_M[kept])
    points_MR = vectors_MM[:, kept] * length_R
    sums = []
    for k in range(folds):
        own = fold_N == k
        sums.append(PairSums.empty(len(length_R)))
        sums[k].add(points_MR[:n][own], points_MR[n:][own])
    whole = _merged(sums)
    unit = np.ones(len(length_R), dtype=np.float32)
    probe_FCR, bias_FC = _solve(sums, whole, np.zeros_like(unit), unit, width, shrinkage)
    held_out_CM = np.empty((len(shrinkage) + 1, 2 * n))
    for k in range(folds):
        own = both(np.flatnonzero(fold_N == k), n)
        held_out_CM[:, own] = (points_MR[own] @ probe_FCR[k].T + bias_FC[k]).T
    basis_DR = (z_MD.T @ (vectors_MM[:, kept] / length_R).astype(np.float32)).astype(np.float32)
    points_MR = points_MR.astype(np.float32)
    return LayerProbes(
        mean_D, scale_D, basis_DR, points_MR, probe_FCR[:, :-1], bias_FC[:, :-1], held_out_CM[:-1], held_out_CM[-1]
    )


def _merged(parts: Sequence[PairSums]) -> PairSums:
    whole = PairSums.empty(len(parts[0].difference_D))
    for part in parts:
        whole.merge(part)
    return whole


def _solve(
    parts: Sequence[PairSums], whole: PairSums, mean_R: Floats, scale_R: Floats, width: int, shrinkage: Sequence[float]
) -> tuple[Floats, Floats]:
    """Probes ``[F, C + 1, R]`` and biases ``[F, C + 1]`` of every run; the last of each is the mean difference."""
    probes, biases = [], []
    for run in [*(whole.without(part) for part in parts), whole]:
        v_R = run.difference_D / max(run.pairs, 1) / scale_R
        s_RR = np.asarray(run.moments.covariance_DD, dtype=np.float64) / np.outer(scale_R, scale_R)
        shift_R = (run.moments.mean_D - mean_R) / scale_R
        diagonal_R = np.diag(s_RR).copy()
        probe_CR = []
        for c in shrinkage:
            np.fill_diagonal(s_RR, diagonal_R + c * diagonal_R.sum() / width)
            probe_CR.append(cho_solve(cho_factor(s_RR, check_finite=False), v_R, check_finite=False))
        np.fill_diagonal(s_RR, diagonal_R)
        probe_CR.append(v_R)
        stacked_CR = np.stack(probe_CR)
        spread_C = np.sqrt(np.maximum(((stacked_CR @ s_RR) * stacked_CR).sum(axis=1), 1e-300))
        stacked_CR /= np.maximum(spread_C, 1e-12)[:, None]
        probes.append(stacked_CR.astype(np.float32))
        biases.append((-stacked_CR @ shift_R).astype(np.float32))
    return np.stack(probes), np.stack(biases)
