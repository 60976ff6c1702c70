"""LEGEND's direction, whitened (methods: Fisher's discriminant with shrinkage; mass-mean probing, arXiv 2310.06824).

    v  = mean( h(chosen) - h(rejected) )
    v* = (S + lambda I)^-1 v           lambda = c trace(S) / D

S is the covariance of ordinary responses at that layer, labels or none: within-class and total covariance differ by a
multiple of v v^T, and give the same direction (Sherman and Morrison, 1950). What is fitted here is judged here as well:
every kept pair by the direction that is made without its prompt (Woodbury's identity: a prompt's rows change S by a
matrix of small rank, so no direction is worked out anew).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh

from inward.offline.states.moments import Moments, PairSums, Sums
from inward.types import Doubles, Floats, Indices

SHRINKAGE = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""The c of lambda that are tried. A mean from few rows beside a covariance from many needs a larger one."""
SINGLE_WIDTH = 1024
"""Wider matrices are decomposed in float32, twice as fast; the least lambda is far above what that loses."""
_NUMBERS_AT_ONCE = 2**24


@dataclass(frozen=True, slots=True, eq=False)
class Whitened:
    """One layer: its directions, one for each c, and what they make of the pairs that were kept."""

    shrinkage: tuple[float, ...]
    lambda_C: Doubles
    direction_CD: Doubles
    """Of unit length."""
    sd_C: Doubles
    """Standard deviation of ordinary responses along each."""
    scores_CM: Doubles
    """Scores of the kept pairs' responses, chosen then rejected, in units of ``sd_C`` about the mean response; each by
    the direction that is made without its prompt.
    """
    train_C: Doubles
    """Share of kept pairs that agree with the direction made of all: flattering."""
    cosine_C: Doubles
    """With the mean difference."""
    mahalanobis_C: Doubles
    """The same in the metric of S: the correlation of the two directions' scores."""
    stability_CB: Doubles
    """Cosines of the direction with those of resampled prompts, S as it is."""


@dataclass(frozen=True, slots=True, eq=False)
class Spectrum:
    """Eigenvalues ``[R]`` and eigenvectors ``[D, R]`` of a covariance, and rows in their coordinates ``[M, R]``."""

    values_R: Doubles
    vectors_DR: Doubles
    points_MR: Doubles
    trace: float
    width: int


def whiten(
    sums: PairSums,
    chosen_ND: Floats,
    rejected_ND: Floats,
    groups_N: Indices,
    *,
    covariance: Moments | None = None,
    shrinkage: Sequence[float] = SHRINKAGE,
    bootstraps: int = 0,
    seed: int = 0,
) -> Whitened:
    """Fits one layer and judges the pairs that were kept.

    Args:
        sums: of all pairs.
        chosen_ND: of the kept pairs, all of whose prompts' pairs are kept; so are ``rejected_ND`` and ``groups_N``.
        covariance: of other responses, labelled or not, to take S from; None: of the pairs themselves.

    Raises:
        DataError: chosen and rejected do not differ.
    """
    v_D = sums.mean_difference_D
    rows_MD = np.concatenate([chosen_ND, rejected_ND]) - sums.moments.mean_D
    spectrum = _spectrum(rows_MD, sums, covariance)
    own = covariance is None
    v_R = v_D @ spectrum.vectors_DR
    lambda_C = np.array(shrinkage) * spectrum.trace / spectrum.width
    inverse_CR = 1 / (spectrum.values_R + lambda_C[:, None])
    length_C = np.linalg.norm(inverse_CR * v_R, axis=1)
    unit_CR = inverse_CR * v_R / length_C[:, None]
    sd_C = np.sqrt(np.maximum((unit_CR**2) @ spectrum.values_R, 1e-300))
    n = len(chosen_ND)
    agree_CN = unit_CR @ (spectrum.points_MR[:n] - spectrum.points_MR[n:]).T > 0
    scores_CM = np.stack(
        [
            _left_out(spectrum, v_R, sums, groups_N, inverse_R, own=own) / (length * sd)
            for inverse_R, length, sd in zip(inverse_CR, length_C, sd_C, strict=True)
        ]
    )
    plain_R = v_R / np.linalg.norm(v_R)
    cosine_C = unit_CR @ plain_R
    overlap_C = (unit_CR * spectrum.values_R) @ plain_R
    return Whitened(
        tuple(shrinkage),
        lambda_C,
        unit_CR @ spectrum.vectors_DR.T,
        sd_C,
        scores_CM,
        agree_CN.mean(axis=1),
        cosine_C,
        overlap_C / (sd_C * np.sqrt(np.maximum((plain_R**2) @ spectrum.values_R, 1e-300))),
        _stability(spectrum, inverse_CR, unit_CR, groups_N, bootstraps, seed),
    )


def _spectrum(rows_MD: Doubles, sums: PairSums, covariance: Moments | None) -> Spectrum:
    """Of S. Where the kept rows are all there are, and fewer than dimensions, in their span: as exact, and cheaper."""
    m, width = rows_MD.shape
    if covariance is None and in_span(m, sums.moments.count, width):
        square_M, vectors_MM = _eigh(rows_MD @ rows_MD.T)
        kept = square_M > square_M[-1] * 1e-10
        length_R, vectors_MR = np.sqrt(square_M[kept]), vectors_MM[:, kept]
        vectors_DR = rows_MD.T @ (vectors_MR / length_R)
        return Spectrum(square_M[kept] / m, vectors_DR, vectors_MR * length_R, float(square_M.sum()) / m, width)
    s_DD = (covariance or sums.moments).covariance_DD
    if width > SINGLE_WIDTH:
        s_DD = s_DD.astype(np.float32)
    values_D, vectors_DD = _eigh(s_DD)
    values_D = np.maximum(values_D, 0)
    return Spectrum(values_D, vectors_DD, rows_MD @ vectors_DD, float(values_D.sum()), width)


def in_span(kept: int, count: float, width: int) -> bool:
    """Whether so many kept rows of ``count`` are worked with in their span, so that no scatter matrix is needed. Not
    where they are nearly as many as dimensions: float32, which their products don't allow, is faster then.
    """
    return kept == count and 3 * kept < 2 * width


def _eigh(symmetric: Sums) -> tuple[Doubles, Doubles]:
    """Eigenvalues, ascending, and eigenvectors, found in the given precision. Divide and conquer: the fastest driver
    where all of them are wanted, most of all in float32. Overwrites what it is given.
    """
    values, vectors = eigh(symmetric, driver="evd", overwrite_a=True, check_finite=False)
    return values.astype(np.float64, copy=False), vectors.astype(np.float64, copy=False)


def _left_out(
    spectrum: Spectrum, v_R: Doubles, sums: PairSums, groups_N: Indices, inverse_R: Doubles, *, own: bool
) -> Doubles:
    """``[M]``: each kept response's score by the direction made without its prompt.

    With K = (S + lambda I)^-1 and the prompt's rows A, whose removal moves the mean by m: the covariance of the others
    is, up to a factor that only rescales lambda, S - B^T B with B = [A; sqrt(M') m] / sqrt(M). Then
    (S - B^T B + lambda I)^-1 v' = K v' + K B^T (I - B K B^T)^-1 B K v'.
    """
    points_MR, n, count = spectrum.points_MR, len(groups_N), sums.moments.count
    scores_M = np.empty(2 * n)
    for members_GK in _by_size(groups_N, len(v_R)):
        k = members_GK.shape[1]
        rows_GJ = np.concatenate([members_GK, members_GK + n], axis=1)
        a_GJR = points_MR[rows_GJ]
        left = max(sums.pairs - k, 1.0)
        v_GR = (sums.pairs * v_R - (a_GJR[:, :k] - a_GJR[:, k:]).sum(axis=1)) / left
        x_GR = v_GR * inverse_R
        mean_GR = np.zeros_like(v_GR)
        if own:
            others = max(count - 2 * k, 1.0)
            mean_GR = -a_GJR.sum(axis=1) / others
            b_GJR = np.concatenate([a_GJR, np.sqrt(others) * mean_GR[:, None]], axis=1) / np.sqrt(count)
            kb_GJR = b_GJR * inverse_R
            left_GJJ = np.eye(2 * k + 1) - kb_GJR @ b_GJR.transpose(0, 2, 1)
            t_GJ = np.linalg.solve(left_GJJ, (b_GJR @ x_GR[:, :, None]))[..., 0]
            x_GR = x_GR + (kb_GJR.transpose(0, 2, 1) @ t_GJ[:, :, None])[..., 0]
        scores_M[rows_GJ] = ((a_GJR - mean_GR[:, None]) @ x_GR[:, :, None])[..., 0]
    return scores_M


def _by_size(groups_N: Indices, width: int) -> Iterator[Indices]:
    """Prompts with equally many pairs, ``[G, K]`` numbers of pairs, so many at once as memory allows."""
    order = np.argsort(groups_N, kind="stable")
    _, starts, counts = np.unique(groups_N[order], return_index=True, return_counts=True)
    for k in np.unique(counts):
        members_GK = order[starts[counts == k][:, None] + np.arange(k)]
        step = max(1, _NUMBERS_AT_ONCE // int(2 * k * width))
        for start in range(0, len(members_GK), step):
            yield members_GK[start : start + step]


def resampled(differences_ND: Floats | Doubles, groups_N: Indices, times: int, seed: int) -> Doubles:
    """``[B, D]``: sums of the pairs' differences, as if other prompts had been drawn, so many ``times``."""
    labels, inverse_N = np.unique(groups_N, return_inverse=True)
    sums_GD = np.zeros((len(labels), differences_ND.shape[1]))
    np.add.at(sums_GD, inverse_N, differences_ND)
    rng = np.random.default_rng(seed)
    times_BG = rng.multinomial(len(labels), np.full(len(labels), 1 / len(labels)), size=times)
    return np.asarray(times_BG @ sums_GD)


def _stability(
    spectrum: Spectrum, inverse_CR: Doubles, unit_CR: Doubles, groups_N: Indices, bootstraps: int, seed: int
) -> Doubles:
    """``[C, B]``"""
    n = len(groups_N)
    drawn_BR = resampled(spectrum.points_MR[:n] - spectrum.points_MR[n:], groups_N, bootstraps, seed)
    return np.stack(
        [
            (drawn_BR * inverse_R) @ unit_R / np.maximum(np.linalg.norm(drawn_BR * inverse_R, axis=1), 1e-300)
            for inverse_R, unit_R in zip(inverse_CR, unit_CR, strict=True)
        ]
    )
