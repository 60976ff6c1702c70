"""Running sums of states: all that a closed-form fit needs of any number of rows.

A block is added with its own mean and scatter (Chan, Golub and LeVeque, 1979), so nothing large is subtracted from
something large, and no state is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from inward.errors import DataError
from inward.types import Doubles, Floats

Sums = Doubles | NDArray[np.float32]
DOUBLE_BYTES = 2 * 2**30
"""Scatter matrices of all layers that may be float64; larger ones are float32, as blocks of hundreds of rows allow."""


@dataclass(slots=True, eq=False)
class Moments:
    """Mean and scatter of the states of one layer."""

    count: float
    """Rows, or the sum of their weights."""
    mean_D: Doubles
    scatter_DD: Sums | None
    """Sum of the outer products of the rows' differences from their mean; None where nobody wants it."""

    @classmethod
    def empty(cls, width: int, dtype: type[np.floating[Any]] | None = np.float64) -> Self:
        """Of no rows. ``dtype``: of the scatter matrix; None: means only."""
        return cls(0.0, np.zeros(width), None if dtype is None else np.zeros((width, width), dtype=dtype))

    def add(self, states_ND: Floats, weight_N: Doubles | None = None) -> None:
        """Adds a block of rows; ``weight_N`` says how often each row counts."""
        weight_N = np.ones(len(states_ND)) if weight_N is None else weight_N
        count = float(weight_N.sum())
        if count <= 0:
            return
        mean_D = (weight_N[:, None] * states_ND).sum(axis=0, dtype=np.float64) / count
        scatter_DD = None
        if self.scatter_DD is not None:
            centred_ND = ((states_ND - mean_D) * np.sqrt(weight_N)[:, None]).astype(np.float32)
            scatter_DD = centred_ND.T @ centred_ND
        self._merge(count, mean_D, scatter_DD)

    def merge(self, other: Moments) -> None:
        """Adds all rows of ``other``."""
        if other.count > 0:
            self._merge(other.count, other.mean_D, other.scatter_DD)

    def without(self, part: Moments) -> Moments:
        """The moments of the rows that are not in ``part``, all of whose rows are in these."""
        count = self.count - part.count
        mean_D = (self.count * self.mean_D - part.count * part.mean_D) / count
        shift_D = part.mean_D - mean_D
        if self.scatter_DD is None or part.scatter_DD is None:
            return Moments(count, mean_D, None)
        scatter_DD = self.scatter_DD - part.scatter_DD
        scatter_DD -= np.outer(shift_D, shift_D) * (count * part.count / self.count)
        return Moments(count, mean_D, scatter_DD)

    @property
    def covariance_DD(self) -> Sums:
        """Of all rows about their mean."""
        assert self.scatter_DD is not None, "these moments hold means only"
        return np.asarray(self.scatter_DD / self.count)

    def _merge(self, count: float, mean_D: Doubles, scatter_DD: Sums | None) -> None:
        total = self.count + count
        shift_D = mean_D - self.mean_D
        if self.scatter_DD is not None and scatter_DD is not None:
            self.scatter_DD += scatter_DD
            if self.count > 0:
                self.scatter_DD += np.outer(shift_D, shift_D) * (self.count * count / total)
        self.mean_D = self.mean_D + shift_D * (count / total)
        self.count = total


@dataclass(slots=True, eq=False)
class PairSums:
    """What a direction of one layer is made of: moments of all responses, and the mean of chosen minus rejected."""

    moments: Moments
    difference_D: Doubles
    """Sum over the pairs."""
    pairs: float = 0.0

    @classmethod
    def empty(cls, width: int, dtype: type[np.floating[Any]] | None = np.float64) -> Self:
        """Of no pairs; see ``Moments.empty``."""
        return cls(Moments.empty(width, dtype), np.zeros(width))

    @classmethod
    def of(cls, chosen_ND: Floats, rejected_ND: Floats) -> Self:
        """Of pairs that are all there."""
        sums = cls.empty(chosen_ND.shape[1])
        sums.add(chosen_ND, rejected_ND)
        return sums

    def add(self, chosen_ND: Floats, rejected_ND: Floats) -> None:
        """Adds a block of pairs."""
        self.moments.add(np.concatenate([chosen_ND, rejected_ND]))
        self.difference_D += (chosen_ND - rejected_ND).sum(axis=0, dtype=np.float64)
        self.pairs += len(chosen_ND)

    def add_responses(self, states_MD: Floats, chosen_M: Doubles, rejected_M: Doubles) -> None:
        """Adds responses, each of which is chosen and rejected in so many pairs; halves of a pair may come apart."""
        self.moments.add(states_MD, chosen_M + rejected_M)
        self.difference_D += (chosen_M - rejected_M) @ states_MD.astype(np.float64)
        self.pairs += float(chosen_M.sum())

    def merge(self, other: PairSums) -> None:
        """Adds all pairs of ``other``."""
        self.moments.merge(other.moments)
        self.difference_D = self.difference_D + other.difference_D
        self.pairs += other.pairs

    def without(self, part: PairSums) -> PairSums:
        """The sums of the pairs that are not in ``part``, all of whose pairs are in these."""
        moments = self.moments.without(part.moments)
        return PairSums(moments, self.difference_D - part.difference_D, self.pairs - part.pairs)

    @property
    def mean_difference_D(self) -> Doubles:
        """LEGEND's standard margin vector, of any length.

        Raises:
            DataError: chosen and rejected states do not differ on average.
        """
        mean_D = self.difference_D / max(self.pairs, 1.0)
        if not np.linalg.norm(mean_D) > 0:
            raise DataError(
                "chosen and rejected states do not differ on average: there is no direction; "
                "are the responses the same?"
            )
        return mean_D

    def tensors(self, prefix: str) -> dict[str, NDArray[Any]]:
        """To be kept in a file."""
        return {
            f"{prefix}counts": np.array([self.moments.count, self.pairs]),
            f"{prefix}mean": self.moments.mean_D,
            f"{prefix}scatter": np.empty((0, 0)) if self.moments.scatter_DD is None else self.moments.scatter_DD,
            f"{prefix}difference": self.difference_D,
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, NDArray[Any]], prefix: str) -> Self:
        """The other way round."""
        count, pairs = (float(x) for x in tensors[f"{prefix}counts"])
        scatter = tensors[f"{prefix}scatter"]
        moments = Moments(count, tensors[f"{prefix}mean"].copy(), scatter.copy() if scatter.size else None)
        return cls(moments, tensors[f"{prefix}difference"].copy(), pairs)


def number_format(layers: int, width: int) -> type[np.floating[Any]]:
    """Of the scatter matrices of so many layers, see ``DOUBLE_BYTES``."""
    return np.float64 if 8 * layers * width**2 <= DOUBLE_BYTES else np.float32
