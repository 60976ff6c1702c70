"""SRR (arXiv 2505.15710): candidates are ranked together, each seen beside the instruction and all the others.

    x   = project(h_prompt) + type, project(h_1), …, project(h_N)      projection D -> k is shared
    e   = one transformer encoder block over x                         post-norm, one head, GELU, no positions
    s_i = cosine(e_prompt, e_i)        p = softmax(s / tau)

The projection is the readout (K = 2k: prompt, then response); block and cosine follow here in numpy. Every list runs by
itself, so there is no padding to mask. Without positions the order of the candidates does not matter; which candidates
there are does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from inward.errors import HeadError, InvalidField
from inward.heads.base import Manifest
from inward.heads.calibration import Deciles, PairCalibration, finite, softmax
from inward.heads.tensors import expect, options_of
from inward.types import Detail, Doubles, Floats, HeadRef, LayerScores, Reading, Readout, Scores, Tap

_EPS = 1e-5
"""torch's for LayerNorm."""


class SrrOptions(BaseModel):
    """``Manifest.options`` of an SRR head."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tau: float = Field(0.2, gt=0, allow_inf_nan=False)
    """Temperature of the softmax over a list."""


SHAPES: dict[str, tuple[int | str, ...]] = {
    "projection.weight": ("k", "D"),
    "projection.bias": ("k",),
    "type_embedding": ("k",),
    "block.self_attn.in_proj_weight": ("3k", "k"),
    "block.self_attn.in_proj_bias": ("3k",),
    "block.self_attn.out_proj.weight": ("k", "k"),
    "block.self_attn.out_proj.bias": ("k",),
    "block.linear1.weight": ("f", "k"),
    "block.linear1.bias": ("f",),
    "block.linear2.weight": ("k", "f"),
    "block.linear2.bias": ("k",),
    "block.norm1.weight": ("k",),
    "block.norm1.bias": ("k",),
    "block.norm2.weight": ("k",),
    "block.norm2.bias": ("k",),
}
"""Names and shapes of the tensors: those of ``fitting.rankers.Ranker.tensors()``."""


@dataclass(slots=True, eq=False)
class SrrHead:
    """A loaded SRR head; make it with ``from_tensors``."""

    manifest: Manifest
    readout: Readout
    options: SrrOptions
    _tensors: Mapping[str, Floats]
    _pairs: PairCalibration

    @classmethod
    def from_tensors(cls, manifest: Manifest, tensors: Mapping[str, Floats]) -> Self:
        """Builds the head of ``manifest`` out of ``head.safetensors`` (see ``SHAPES``).

        Raises:
            HeadError: names or shapes that do not fit, more than one layer, or options or a calibration that can't be
                used.
        """
        sizes = expect(manifest, tensors, SHAPES)
        where = f"head {manifest.name!r}"
        if sizes["3k"] != 3 * sizes["k"]:
            raise HeadError(
                f"{where}: block.self_attn.in_proj_weight has {sizes['3k']} rows instead of {3 * sizes['k']}: fit the "
                "head again"
            )
        if len(manifest.layers) != 1:
            raise HeadError(f"{where}: an srr head reads one layer, its manifest names {list(manifest.layers)}")
        if manifest.pool is not None:
            raise HeadError(f"{where}: an srr head ranks whole responses and pools no token scores: fit it again")
        if manifest.position == "prompt":
            raise HeadError(
                f"{where}: position 'prompt' is the same for all candidates; use last, eos or mean, or fit the head "
                "again"
            )
        options = options_of(manifest, SrrOptions)
        pairs = PairCalibration.load(manifest.calibration)
        Deciles.load(manifest.calibration)
        (layer,) = manifest.layers
        weight_DK = np.ascontiguousarray(tensors["projection.weight"].T, dtype=np.float32)
        bias_K = np.asarray(tensors["projection.bias"], dtype=np.float32)
        prompt = Tap(layer, "prompt", weight_DK, bias_K, manifest.final_norm)
        response = Tap(layer, manifest.position, weight_DK, bias_K, manifest.final_norm)
        return cls(manifest, Readout((prompt, response)), options, dict(tensors), pairs)

    @property
    def ref(self) -> HeadRef:
        return HeadRef(self.manifest.name, "srr", self.manifest.version)

    def tensors(self) -> Mapping[str, Floats]:
        return dict(self._tensors)

    @property
    def pools(self) -> bool:
        return False

    def score(self, reading: Reading, *, details: frozenset[Detail] = frozenset(), pair: bool = False) -> Scores:
        """Cosines of a list's responses to its instruction, and as ``share_N`` their softmax over the list. That is no
        probability that a response is acceptable, which this head does not know.

        A response that is not finite gets None and is left out of the list, so that the others are ranked among
        themselves. A list of one is legal: its score is its cosine, and it has no share.

        Raises:
            InvalidField: detail ``tokens``.
        """
        if "tokens" in details:
            raise InvalidField(
                f"head {self.manifest.name!r} ranks whole responses against each other and has no score for a single "
                "token: ask for detail 'tokens' with a legend or hybrid head",
                param="detail",
            )
        prompt_NK, response_NK = np.split(reading.values_NK.astype(np.float64), 2, axis=1)
        finite_N = np.asarray(np.isfinite(reading.values_NK).all(axis=1))
        scores_N = np.full(len(finite_N), np.nan)
        if finite_N.any():
            scores_N[finite_N] = self.rank(prompt_NK[finite_N][0], response_NK[finite_N])
        finite_N &= np.isfinite(scores_N)
        share_N = np.full(len(finite_N), np.nan)
        share_N[finite_N] = softmax(scores_N[finite_N] / self.options.tau)
        scores = tuple(map(finite, scores_N))
        return Scores(
            scores_N=scores,
            layers_N=tuple(LayerScores(self.manifest.layers, (s,)) for s in scores) if "layers" in details else None,
            pair=self._pairs.compare(scores) if pair else None,
            listwise=True,
            share_N=tuple(map(finite, share_N)) if finite_N.sum() > 1 else None,
        )

    def rank(self, prompt_K: Doubles, responses_NK: Doubles) -> Doubles:
        """Cosines ``[N]`` out of the projected instruction ``[k]`` and candidates ``[N, k]`` of one list."""
        encoded = self._block(np.vstack([prompt_K + self._tensors["type_embedding"], responses_NK]))
        unit = encoded / np.maximum(np.linalg.norm(encoded, axis=1, keepdims=True), 1e-8)
        return np.asarray(unit[1:] @ unit[0])

    def _block(self, x_SK: Doubles) -> Doubles:
        """``torch.nn.TransformerEncoderLayer`` with one head, GELU and post-norm, in evaluation mode."""
        from scipy.special import erf  # a second to import, and an API replica, which scores nothing, has none

        attended_SK = self._linear("self_attn.out_proj", self._attend(x_SK))
        x_SK = self._norm("norm1", x_SK + attended_SK)
        inner_SF = self._linear("linear1", x_SK)
        inner_SF = 0.5 * inner_SF * (1 + erf(inner_SF / math.sqrt(2)))
        return self._norm("norm2", x_SK + self._linear("linear2", inner_SF))

    def _attend(self, x_SK: Doubles) -> Doubles:
        qkv = x_SK @ self._tensors["block.self_attn.in_proj_weight"].T + self._tensors["block.self_attn.in_proj_bias"]
        query_SK, key_SK, value_SK = np.split(qkv, 3, axis=1)
        return np.asarray(softmax(query_SK @ key_SK.T / math.sqrt(x_SK.shape[1])) @ value_SK)

    def _linear(self, name: str, x: Doubles) -> Doubles:
        return np.asarray(x @ self._tensors[f"block.{name}.weight"].T + self._tensors[f"block.{name}.bias"])

    def _norm(self, name: str, x: Doubles) -> Doubles:
        centred = x - x.mean(axis=1, keepdims=True)
        normed = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + _EPS)
        return np.asarray(normed * self._tensors[f"block.{name}.weight"] + self._tensors[f"block.{name}.bias"])
