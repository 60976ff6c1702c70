"""Hybrid reward (arXiv 2503.10093): a linear probe per layer, and a gate that weighs them.

    t_l = <w_l, z_l> + b_l      z_l = (h_l - mean_l) / scale_l
    g   = sigmoid(V t)          or softmax(V t)
    R   = sum_l g_l t_l

The probes, standardisation folded in, are the readout (one number a layer); gate and confidence follow here in numpy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np
from numpy.typing import ArrayLike
from pydantic import BaseModel, ConfigDict, Field

from inward.errors import HeadError, InternalError
from inward.heads.base import Manifest
from inward.heads.calibration import Deciles, PairCalibration, Platt, finite, probabilities, sigmoid, softmax
from inward.heads.pooling import Pooler, shapes
from inward.heads.tensors import expect, options_of, pooler_of
from inward.types import Detail, Doubles, Floats, Gamma, HeadRef, LayerScores, PairScores, Reading, Readout, Scores, Tap

Gate = Literal["sigmoid", "softmax"]


class Confidence(BaseModel):
    """How a pair's confidence is worked out: ``Manifest.options["confidence"]``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    alpha: float = Field(7.5, gt=0, allow_inf_nan=False)
    squash: bool = True
    floor: float | None = Field(0.5, ge=0, le=1)

    @property
    def gamma(self) -> Gamma:
        """As it travels with scores."""
        return Gamma(self.alpha, self.squash, self.floor)

    def compare(self, pairs: PairCalibration, scores_N: Sequence[float | None]) -> PairScores:
        """What ``pairs`` says of a pair, chosen first, and its gamma."""
        compared = pairs.compare(scores_N)
        chosen, rejected = scores_N
        if chosen is None or rejected is None:
            return compared
        return replace(compared, confidence=float(confidence(chosen, rejected, **self.model_dump())))


class HybridOptions(BaseModel):
    """``Manifest.options`` of a hybrid head."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gate: Gate = "sigmoid"
    confidence: Confidence = Confidence()


def confidence(
    r_chosen: ArrayLike, r_rejected: ArrayLike, *, alpha: float = 7.5, squash: bool = True, floor: float | None = 0.5
) -> Doubles:
    """Gamma of cDPO, the weight of a pair's label, elementwise (eq. 8): ``sigmoid(alpha (R_c - R_r))``. It is not
    calibrated; ``PairScores.label_probability`` is.

    Raw rewards saturate it (a difference of 1 gives 0.9994), so by default they pass a sigmoid first, as in the
    authors' code, and gamma does not fall below ``floor``: 0.5 says "the label tells nothing", less would reverse the
    pair in cDPO. Unlike there, every pair has its own gamma instead of one for a batch.

    Args:
        r_chosen: rewards of the chosen responses.
        r_rejected: rewards of the rejected ones, same shape.
        alpha: steepness.
        squash: compare ``sigmoid(R)`` instead of R.
        floor: lowest value, or None.
    """
    chosen, rejected = np.asarray(r_chosen, dtype=np.float64), np.asarray(r_rejected, dtype=np.float64)
    difference = sigmoid(chosen) - sigmoid(rejected) if squash else chosen - rejected
    gamma = sigmoid(alpha * difference)
    return gamma if floor is None else np.maximum(gamma, floor)


def gates(values: Doubles, gate_weight_LL: Doubles, kind: Gate) -> Doubles:
    """``[..., L]``: what each layer's probe output ``values`` ``[..., L]`` is multiplied by."""
    logits = values @ gate_weight_LL.T
    return sigmoid(logits) if kind == "sigmoid" else softmax(logits)


@dataclass(slots=True, eq=False)
class HybridHead:
    """A loaded hybrid head; make it with ``from_tensors``."""

    manifest: Manifest
    readout: Readout
    probe_weight_LD: Floats
    probe_bias_L: Floats
    gate_weight_LL: Floats
    mean_LD: Floats
    scale_LD: Floats
    options: HybridOptions
    _platt: Platt | None
    _pairs: PairCalibration
    pooler: Pooler | None = None

    @classmethod
    def from_tensors(cls, manifest: Manifest, tensors: Mapping[str, Floats]) -> Self:
        """Builds the head of ``manifest`` out of ``head.safetensors``.

        Args:
            manifest: of kind ``hybrid``.
            tensors: ``probe_weight`` [L, D], ``probe_bias`` [L], ``gate_weight`` [L, L], ``mean`` [L, D], ``scale``
                [L, D]; of a trained pool also ``pool_weight`` [D], ``pool_bias`` [1].

        Raises:
            HeadError: names or shapes that do not fit, a scale that is not positive, or options or a calibration that
                can't be used.
        """
        n = len(manifest.layers)
        matrix = (n, "D")
        own: dict[str, tuple[int | str, ...]] = {"probe_weight": matrix, "probe_bias": (n,), "gate_weight": (n, n)}
        expect(manifest, tensors, {**own, "mean": matrix, "scale": matrix, **shapes(manifest.pool)})
        if not (tensors["scale"] > 0).all():
            raise HeadError(
                f"head {manifest.name!r}: tensor 'scale' has entries that are not positive: fit the head again"
            )
        options = options_of(manifest, HybridOptions)
        platt, pairs = Platt.load(manifest.calibration), PairCalibration.load(manifest.calibration)
        Deciles.load(manifest.calibration)
        names = ("probe_weight", "probe_bias", "gate_weight", "mean", "scale")
        weight, bias, gate, mean, scale = (np.asarray(tensors[name], dtype=np.float32) for name in names)
        pooler = pooler_of(manifest, tensors)
        readout = Readout(_taps(manifest, weight, bias, mean, scale) + (pooler.taps if pooler else ()))
        return cls(manifest, readout, weight, bias, gate, mean, scale, options, platt, pairs, pooler)

    @property
    def ref(self) -> HeadRef:
        return HeadRef(self.manifest.name, "hybrid", self.manifest.version)

    def tensors(self) -> Mapping[str, Floats]:
        return {
            "probe_weight": self.probe_weight_LD,
            "probe_bias": self.probe_bias_L,
            "gate_weight": self.gate_weight_LL,
            "mean": self.mean_LD,
            "scale": self.scale_LD,
            **(self.pooler.tensors if self.pooler else {}),
        }

    @property
    def pools(self) -> bool:
        return self.pooler is not None

    def rewards(self, values: ArrayLike) -> tuple[Doubles, Doubles]:
        """Rewards ``[...]`` and gates ``[..., L]`` of probe outputs ``[..., L]``; what is not finite gives what is
        not finite.
        """
        t = np.asarray(values, dtype=np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            g = gates(t, self.gate_weight_LL.astype(np.float64), self.options.gate)
            return np.asarray((g * t).sum(axis=-1)), g

    def score(self, reading: Reading, *, details: frozenset[Detail] = frozenset(), pair: bool = False) -> Scores:
        """The reward of each response.

        A response with a state that is not finite has no score (None), no probability and no token scores; the others
        keep theirs. Of a ``pair`` there is also the ``confidence`` (gamma, by ``options.confidence``).
        """
        values_NL = self._own(reading.values_NK)
        rewards_N, gates_NL = self.rewards(values_NL)
        if self.pooler:
            rewards_N = self.pooler.scores(reading, lambda values_TL: self.rewards(values_TL)[0])
        scores_N = tuple(finite(reward) for reward in rewards_N)
        return Scores(
            scores_N=scores_N,
            probability_N=probabilities(self._platt, scores_N),
            layers_N=self._layers(values_NL, gates_NL) if "layers" in details else None,
            tokens_N=self._tokens(reading) if "tokens" in details else None,
            map_N=self._map(reading) if {"layers", "tokens"} <= details else None,
            pair=self.options.confidence.compare(self._pairs, scores_N) if pair else None,
            gamma=self.options.confidence.gamma,
        )

    def _layers(self, values_NL: Floats, gates_NL: Doubles) -> tuple[LayerScores, ...]:
        return tuple(
            LayerScores(self.manifest.layers, tuple(map(finite, values)), tuple(map(finite, gate)))
            for values, gate in zip(values_NL, gates_NL, strict=True)
        )

    def _tokens(self, reading: Reading) -> tuple[tuple[float, ...], ...]:
        if reading.tokens_TK is None:
            raise InternalError("detail 'tokens' was asked for, but the backbone was not asked to read every token")
        rewards = [self.rewards(self._own(values_TK))[0] for values_TK in reading.tokens_TK]
        return tuple(tuple(map(float, r)) if np.isfinite(r).all() else () for r in rewards)

    def _map(self, reading: Reading) -> tuple[tuple[tuple[float, ...], ...], ...]:
        """Each layer's probe times its gate, ``[T, L]`` of each response: a token's sum is its score."""
        parts = []
        for values_TK in reading.tokens_TK or ():
            values_TL = self._own(values_TK).astype(np.float64)
            parts_TL = values_TL * self.rewards(values_TL)[1]
            parts.append(tuple(tuple(map(float, row)) for row in parts_TL) if np.isfinite(parts_TL).all() else ())
        return tuple(parts)

    def _own(self, values_NK: Floats) -> Floats:
        """Probe outputs, without what the pool reads."""
        return values_NK[:, : len(self.manifest.layers)]


def _taps(manifest: Manifest, weight_LD: Floats, bias_L: Floats, mean_LD: Floats, scale_LD: Floats) -> tuple[Tap, ...]:
    """One tap a layer with the standardisation folded in: ``w' = w / scale``, ``b' = b - <w', mean>``, in float64."""
    folded_LD = weight_LD.astype(np.float64) / scale_LD
    offset_L = bias_L - (folded_LD * mean_LD).sum(axis=1)
    return tuple(
        Tap(
            layer,
            manifest.position,
            folded_LD[l, :, None].astype(np.float32),
            offset_L[l : l + 1].astype(np.float32),
            final_norm=manifest.final_norm and layer == max(manifest.layers),
        )
        for l, layer in enumerate(manifest.layers)
    )
