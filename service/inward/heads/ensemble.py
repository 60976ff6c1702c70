"""Several heads as one: the weighted sum of their standardised scores.

    s = sum_i weight_i (s_i - centre_i) / spread_i

The folder holds its parts whole (manifests in ``options``, tensors under ``0.``, ``1.``, …), so that it is served by
itself, and an update of the head that a part was made of does not change it. Their readouts stand side by side: one
pass, one name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from inward.errors import HeadError
from inward.heads.base import Head, Manifest
from inward.heads.calibration import Deciles, PairCalibration, Platt, finite, probabilities
from inward.heads.hybrid import Confidence, HybridHead
from inward.heads.legend import LegendHead
from inward.heads.tensors import options_of
from inward.types import Detail, Doubles, Floats, HeadRef, Kind, LayerScores, Reading, Readout, Scores

PARTS: Mapping[Kind, Callable[[Manifest, Mapping[str, Floats]], Head]] = {
    "legend": LegendHead.from_tensors,
    "hybrid": HybridHead.from_tensors,
}
"""Kinds that score a response by itself, which a sum of standardised scores needs."""


class Part(BaseModel):
    """One part: its manifest as it was, and how its score enters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    manifest: Manifest
    weight: float = Field(ge=0, allow_inf_nan=False)
    centre: float = Field(allow_inf_nan=False)
    spread: float = Field(gt=0, allow_inf_nan=False)


class EnsembleOptions(BaseModel):
    """``Manifest.options`` of an ensemble."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    parts: tuple[Part, ...] = Field(min_length=1)
    confidence: Confidence = Confidence()
    of: str | None = None
    """Of a value head: the head whose reward it predicts."""
    of_version: int | None = None
    of_created: str | None = None


@dataclass(slots=True, eq=False)
class EnsembleHead:
    """A loaded ensemble; make it with ``from_tensors`` or ``of``."""

    manifest: Manifest
    readout: Readout
    parts: tuple[Head, ...]
    options: EnsembleOptions
    _platt: Platt | None
    _pairs: PairCalibration

    @classmethod
    def from_tensors(cls, manifest: Manifest, tensors: Mapping[str, Floats]) -> Self:
        """Builds the head of ``manifest`` out of ``head.safetensors``: each part's tensors after its number and a dot.

        Raises:
            HeadError: a part that can't be loaded, ranks lists, or is of another backbone or template.
        """
        where = f"head {manifest.name!r}"
        options = options_of(manifest, EnsembleOptions, "fit the ensemble again")
        if strange := [name for name in tensors if name.partition(".")[0] not in map(str, range(len(options.parts)))]:
            raise HeadError(f"{where}: head.safetensors has tensors of no part: {', '.join(sorted(strange))}")
        for part in options.parts:
            own = part.manifest
            if own.kind not in PARTS:
                known = " and ".join(PARTS)
                raise HeadError(f"{where}: part {own.name!r} is a {own.kind} head: only {known} heads add up")
            if (own.backbone.fingerprint, own.template) != (manifest.backbone.fingerprint, manifest.template):
                raise HeadError(f"{where}: part {own.name!r} was fitted on another backbone or template: fit it again")
        parts = tuple(PARTS[part.manifest.kind](part.manifest, _of(tensors, i)) for i, part in enumerate(options.parts))
        platt, pairs = Platt.load(manifest.calibration), PairCalibration.load(manifest.calibration)
        Deciles.load(manifest.calibration)
        readout = Readout(tuple(tap for part in parts for tap in part.readout.taps))
        return cls(manifest, readout, parts, options, platt, pairs)

    @property
    def ref(self) -> HeadRef:
        return HeadRef(self.manifest.name, self.manifest.kind, self.manifest.version)

    @property
    def pools(self) -> bool:
        return any(part.pools for part in self.parts)

    def tensors(self) -> Mapping[str, Floats]:
        return {f"{i}.{name}": tensor for i, part in enumerate(self.parts) for name, tensor in part.tensors().items()}

    def score(self, reading: Reading, *, details: frozenset[Detail] = frozenset(), pair: bool = False) -> Scores:
        """The sum for each response; None where a part has no finite score. Detail ``layers`` holds each part's own."""
        said = [part.score(own, details=details) for part, own in zip(self.parts, self._split(reading), strict=True)]
        sums_N = self._sum([np.array(one.scores_N, dtype=np.float64) for one in said])  # None is NaN
        scores_N = tuple(map(finite, sums_N))
        return Scores(
            scores_N,
            probability_N=probabilities(self._platt, scores_N),
            layers_N=self._layers(said) if "layers" in details else None,
            tokens_N=self._tokens(said) if "tokens" in details else None,
            pair=self.options.confidence.compare(self._pairs, scores_N) if pair else None,
            gamma=self.options.confidence.gamma,
        )

    def _split(self, reading: Reading) -> list[Reading]:
        """Each part's own numbers."""
        cuts = np.cumsum([len(part.readout.taps) for part in self.parts])[:-1]  # a number a tap
        values = np.split(reading.values_NK, cuts, axis=1)
        if reading.tokens_TK is None:
            return [Reading(own) for own in values]
        tokens = [np.split(values_TK, cuts, axis=1) for values_TK in reading.tokens_TK]
        return [Reading(own, tuple(parts[i] for parts in tokens)) for i, own in enumerate(values)]

    def _sum(self, scores: Sequence[Doubles]) -> Doubles:
        parts = [p.weight * (s - p.centre) / p.spread for p, s in zip(self.options.parts, scores, strict=True)]
        return np.asarray(np.sum(parts, axis=0))

    def _tokens(self, said: Sequence[Scores]) -> tuple[tuple[float, ...], ...]:
        tokens = [one.tokens_N or () for one in said]
        return tuple(
            tuple(map(float, self._sum([np.array(own) for own in of_parts]))) if all(of_parts) else ()
            for of_parts in zip(*tokens, strict=True)
        )

    def _layers(self, said: Sequence[Scores]) -> tuple[LayerScores, ...]:
        """Every part's layers and values, one part after the other."""
        of_parts = [one.layers_N or () for one in said]
        return tuple(
            LayerScores(
                tuple(layer for own in response for layer in own.layers),
                tuple(value for own in response for value in own.values),
            )
            for response in zip(*of_parts, strict=True)
        )


def _of(tensors: Mapping[str, Floats], part: int) -> dict[str, Floats]:
    prefix = f"{part}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
