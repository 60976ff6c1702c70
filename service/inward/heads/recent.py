"""How well a head still fits the states that it is updated on: the policy moves, and its states move under the head.

The head is compared with one that is refitted in closed form on recent pairs: ridge regression of the labels on each
layer's standardised states, which is the whitened direction, and the layers' scores summed. The figure is the
correlation of what the two say of these responses, that is the cosine of their directions in the metric of the states'
covariance (Mahalanobis). A plain cosine would count dimensions in which nothing varies.

Every pair is scored by a refit without it (with ``A = K + lambda I`` and labels y, the block of a pair is ``y_B -
(A^-1_BB)^-1 (A^-1 y)_B``): on few pairs a refit knows its own answers, and nothing else, by heart.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from inward.heads.hybrid import HybridHead, gates
from inward.types import Doubles, Floats

KEPT_PAIRS = 128
KEPT_BYTES = 256 * 2**20
"""Most memory for their states, float16."""
LEAST_PAIRS = 32
"""With fewer the figure is noise."""
SHRINKAGE = 1.0
"""lambda, as a multiple of the mean variance of a dimension."""


class RecentPairs:
    """The pairs of the last updates, as states at one head's layers."""

    def __init__(self) -> None:
        self._pairs: deque[NDArray[np.float16]] = deque()

    def add(self, chosen_NLD: Floats, rejected_NLD: Floats) -> None:
        """Keeps the pairs of an update; the oldest go, and all of them where the head reads other layers now."""
        if self._pairs and self._pairs[0].shape[1:] != chosen_NLD.shape[1:]:
            self._pairs.clear()
        limit = np.finfo(np.float16).max
        for pair_2LD in np.stack([chosen_NLD, rejected_NLD], axis=1):
            self._pairs.append(np.clip(pair_2LD, -limit, limit).astype(np.float16))
        while len(self._pairs) > max(2, min(KEPT_PAIRS, KEPT_BYTES // self._pairs[-1].nbytes)):
            self._pairs.popleft()

    def cosine(self, head: HybridHead) -> float | None:
        """Of the head and a refitted one, see the module; None while there are too few pairs, or where a score does not
        vary.
        """
        if len(self._pairs) < LEAST_PAIRS:
            return None
        both_2NLD = np.stack(self._pairs, axis=1).astype(np.float32)
        states_MLD = both_2NLD.reshape(-1, *both_2NLD.shape[2:])
        z_MLD = (states_MLD - head.mean_LD) / head.scale_LD
        values_ML = np.einsum("mld,ld->ml", z_MLD, head.probe_weight_LD).astype(np.float64) + head.probe_bias_L
        own_M = (gates(values_ML, head.gate_weight_LL.astype(np.float64), head.options.gate) * values_ML).sum(axis=1)
        refitted_M = np.sum(list(_left_out(z_MLD)), axis=0)
        if not (own_M.std() > 0 and refitted_M.std() > 0):
            return None
        return float(np.corrcoef(own_M, refitted_M)[0, 1])


def _left_out(z_MLD: Floats) -> Iterator[Doubles]:
    """Each layer's scores ``[2N]``, chosen then rejected, of standard deviation 1, by fits without the pair."""
    m, layers, width = z_MLD.shape
    n = m // 2
    y_M = np.repeat([1.0, -1.0], n)
    pair_N2 = np.stack([np.arange(n), np.arange(n) + n], axis=1)
    for layer in range(layers):
        z_MD = z_MLD[:, layer] - z_MLD[:, layer].mean(axis=0)
        kernel_MM = (z_MD @ z_MD.T).astype(np.float64)
        strength = SHRINKAGE * float(np.trace(kernel_MM)) / width
        inverse_MM = np.linalg.inv(kernel_MM + max(strength, 1e-9) * np.eye(m))
        block_N22 = inverse_MM[pair_N2[:, :, None], pair_N2[:, None, :]]
        missed_N2 = np.linalg.solve(block_N22, (inverse_MM @ y_M)[pair_N2][:, :, None])[..., 0]
        scores_M = (y_M[pair_N2] - missed_N2).T.ravel()
        yield scores_M / max(float(scores_M.std()), 1e-12)
