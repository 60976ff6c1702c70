"""LEGEND (arXiv 2406.08124, AAAI 2025): the score is one dot product with the standard margin vector.

score(x, y)         = <h(x, y), v> / ||v||
margin(x, y_c, y_r) = score(x, y_c) - score(x, y_r)      positive: the chosen answer is on the safe side
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Self

import numpy as np

from inward.errors import HeadError, InternalError
from inward.heads.base import Manifest
from inward.heads.calibration import Deciles, PairCalibration
from inward.heads.tensors import expect
from inward.types import Detail, Floats, HeadRef, LayerScores, Reading, Readout, Scores, Tap


class LegendHead:
    """A unit vector at one layer.

    Args:
        manifest: names exactly one layer; its ``calibration`` may hold what ``PairCalibration`` reads.
        direction_D: of unit length, pointing from harmful to safe.

    Raises:
        HeadError: more than one layer, or another length.
    """

    def __init__(self, manifest: Manifest, direction_D: Floats) -> None:
        if len(manifest.layers) != 1:
            raise HeadError(
                f"head {manifest.name!r}: a legend head reads one layer, its manifest names {list(manifest.layers)}"
            )
        length = float(np.linalg.norm(direction_D.astype(np.float64)))
        if not abs(length - 1) < 1e-3:
            raise HeadError(
                f"head {manifest.name!r}: direction has length {length:.4g} instead of 1: fit the head again"
            )
        self.manifest = manifest
        self.direction_D = direction_D
        (layer,) = manifest.layers
        self.readout = Readout((Tap(layer, manifest.position, direction_D[:, None], final_norm=manifest.final_norm),))
        self._pairs = PairCalibration.load(manifest.calibration)
        Deciles.load(manifest.calibration)

    @classmethod
    def from_tensors(cls, manifest: Manifest, tensors: Mapping[str, Floats]) -> Self:
        """Made of what ``head.safetensors`` holds: ``direction`` ``[D]``.

        Raises:
            HeadError: wrong names, shapes or length.
        """
        expect(manifest, tensors, {"direction": ("D",)})
        return cls(manifest, tensors["direction"])

    @property
    def ref(self) -> HeadRef:
        return HeadRef(self.manifest.name, self.manifest.kind, self.manifest.version)

    def score(self, reading: Reading, *, details: frozenset[Detail] = frozenset(), pair: bool = False) -> Scores:
        """See ``Head.score``."""
        scores = tuple(_finite(float(value)) for value in reading.values_NK[:, 0])
        return Scores(
            scores,
            layers_N=tuple(LayerScores(self.manifest.layers, (s,)) for s in scores) if "layers" in details else None,
            tokens_N=_tokens(reading) if "tokens" in details else None,
            pair=self._pairs.compare(scores) if pair else None,
        )

    def tensors(self) -> Mapping[str, Floats]:
        """See ``Head.tensors``."""
        return {"direction": self.direction_D}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _tokens(reading: Reading) -> tuple[tuple[float, ...], ...]:
    """The score at every token; nothing for a response in which one of them is not finite."""
    if reading.tokens_TK is None:
        raise InternalError("token scores were asked for, but the backbone was not asked to read every token")
    return tuple(
        tuple(map(float, values_TK[:, 0])) if np.isfinite(values_TK).all() else () for values_TK in reading.tokens_TK
    )
