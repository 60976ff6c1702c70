"""LEGEND (arXiv 2406.08124, AAAI 2025): the score is one dot product with the standard margin vector.

score(x, y)         = <h(x, y), v> / ||v||          of several layers: the sum of theirs
margin(x, y_c, y_r) = score(x, y_c) - score(x, y_r)      positive: the chosen answer is on the safe side
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Self

import numpy as np

from inward.errors import HeadError, InternalError
from inward.heads.base import Manifest
from inward.heads.calibration import Deciles, PairCalibration, Platt, finite, probabilities
from inward.heads.pooling import Pooler, shapes
from inward.heads.tensors import expect, pooler_of
from inward.types import Detail, Doubles, Floats, HeadRef, LayerScores, Reading, Readout, Scores, Tap


class LegendHead:
    """A unit vector at one layer, or one vector at each of several layers, whose products are summed.

    Args:
        manifest: its ``calibration`` may hold ``platt`` and what ``PairCalibration`` reads, its ``options`` an
            ``offset``.
        direction: pointing from harmful to safe; of one layer ``[D]``, of unit length; of several ``[L, D]``, of
            lengths that make their products comparable.
        pooler: of ``manifest.pool``.

    Raises:
        HeadError: another shape, or another length.
    """

    def __init__(self, manifest: Manifest, direction: Floats, pooler: Pooler | None = None) -> None:
        layers = manifest.layers
        if direction.ndim == 1:
            _check_single(manifest, direction)
        elif not direction.any(axis=1).all():
            raise HeadError(f"head {manifest.name!r}: the direction of one of its layers is zero: fit the head again")
        self.manifest = manifest
        self.direction = direction
        self._pooler = pooler
        taps = tuple(
            Tap(
                layer,
                manifest.position,
                row_D[:, None],
                _offset(manifest) if layer == layers[0] else None,
                final_norm=manifest.final_norm and layer == max(layers),
            )
            for layer, row_D in zip(layers, np.atleast_2d(direction), strict=True)
        )
        self.readout = Readout(taps + (pooler.taps if pooler else ()))
        self._pairs = PairCalibration.load(manifest.calibration)
        self._platt = Platt.load(manifest.calibration)
        Deciles.load(manifest.calibration)

    @classmethod
    def from_tensors(cls, manifest: Manifest, tensors: Mapping[str, Floats]) -> Self:
        """Made of what ``head.safetensors`` holds: ``direction`` ``[D]``, or ``[L, D]`` for several layers; a trained
        pool's ``pool_weight`` ``[D]`` and ``pool_bias`` ``[1]``.

        Raises:
            HeadError: wrong names, shapes or length.
        """
        several = "direction" in tensors and tensors["direction"].ndim == 2
        shape: tuple[int | str, ...] = (len(manifest.layers), "D") if several else ("D",)
        expect(manifest, tensors, {"direction": shape, **shapes(manifest.pool)})
        return cls(manifest, tensors["direction"], pooler_of(manifest, tensors))

    @property
    def ref(self) -> HeadRef:
        return HeadRef(self.manifest.name, self.manifest.kind, self.manifest.version)

    def score(self, reading: Reading, *, details: frozenset[Detail] = frozenset(), pair: bool = False) -> Scores:
        """See ``Head.score``."""
        values_N = self._pooler.scores(reading, self._sum) if self._pooler else self._sum(reading.values_NK)
        scores = tuple(map(finite, values_N))
        return Scores(
            scores,
            probability_N=probabilities(self._platt, scores),
            layers_N=self._layers(reading) if "layers" in details else None,
            tokens_N=self._tokens(reading) if "tokens" in details else None,
            pair=self._pairs.compare(scores) if pair else None,
        )

    def _layers(self, reading: Reading) -> tuple[LayerScores, ...]:
        layers = self.manifest.layers
        return tuple(LayerScores(layers, tuple(map(finite, row))) for row in self._own(reading.values_NK))

    def _tokens(self, reading: Reading) -> tuple[tuple[float, ...], ...]:
        """The score at every token; nothing for a response in which one of them is not finite."""
        if reading.tokens_TK is None:
            raise InternalError("token scores were asked for, but the backbone was not asked to read every token")
        return tuple(
            tuple(map(float, self._sum(values_TK))) if np.isfinite(values_TK).all() else ()
            for values_TK in reading.tokens_TK
        )

    def _own(self, values_NK: Floats) -> Floats:
        """Without what the pool reads."""
        return values_NK[:, : len(self.manifest.layers)]

    def _sum(self, values_NK: Floats) -> Doubles:
        """Over the layers."""
        return np.asarray(self._own(values_NK).sum(axis=1, dtype=np.float64))

    @property
    def pools(self) -> bool:
        return self._pooler is not None

    def tensors(self) -> Mapping[str, Floats]:
        """See ``Head.tensors``."""
        return {"direction": self.direction, **(self._pooler.tensors if self._pooler else {})}


def _offset(manifest: Manifest) -> Floats | None:
    """``options.offset`` is added to the score, so that the mean response of the fit has score 0."""
    offset = manifest.options.get("offset")
    if offset is None:
        return None
    if isinstance(offset, bool) or not isinstance(offset, int | float) or not math.isfinite(offset):
        raise HeadError(f"head {manifest.name!r}: options.offset in head.json must be a number: fit the head again")
    return np.array([offset], dtype=np.float32)


def _check_single(manifest: Manifest, direction_D: Floats) -> None:
    if len(manifest.layers) != 1:
        layers = list(manifest.layers)
        raise HeadError(f"head {manifest.name!r}: one direction reads one layer, its manifest names {layers}")
    length = float(np.linalg.norm(direction_D.astype(np.float64)))
    if not abs(length - 1) < 1e-3:
        raise HeadError(f"head {manifest.name!r}: direction has length {length:.4g} instead of 1: fit the head again")
