"""Heads and states small enough to write down, for tests of what is done with them."""

from __future__ import annotations

import numpy as np

from inward.heads.base import BackboneRef, Manifest
from inward.heads.legend import LegendHead
from inward.offline.states.saved import Origin, PairStates

BACKBONE = BackboneRef(name="tiny", fingerprint="sha256:tiny")


def manifest(**changes):
    fields = {
        "name": "legend", "kind": "legend", "version": 1, "created": "2025-01-01T00:00:00Z", "backbone": BACKBONE,
        "layers": (2,), "template": "format:{prompt}{response}",
        "calibration": {"margin_std": 2.0, "bin_edges": [1.0, 2.0, 3.0], "bin_values": [0.0, 0.25, 0.5, 1.0]},
    }  # fmt: skip
    return Manifest(**{**fields, **changes})


def legend(seed=0, width=4, **changes):
    direction = np.random.default_rng(seed).normal(size=width)
    tensors = {"direction": (direction / np.linalg.norm(direction)).astype(np.float32)}
    return LegendHead.from_tensors(manifest(**changes), tensors)


def pair_states(n=120, layers=(1, 2, 3), width=12, per_prompt=3, seed=0, strength=(0.2, 2.0, 0.5), first=0):
    """Chosen minus rejected is ``strength[l]`` along a known axis, plus noise; every ``per_prompt`` rows share a
    prompt, numbered from ``first``."""
    rng = np.random.default_rng(seed)
    axis = np.eye(width)[0]
    rejected = rng.normal(size=(n, len(layers), width))
    noise = rng.normal(size=rejected.shape)
    chosen = rejected + noise + np.array(strength)[None, :, None] * axis
    lengths = rng.integers(-20, 20, size=n).astype(float)
    return PairStates(
        chosen.astype(np.float32), rejected.astype(np.float32), tuple(layers), first + np.arange(n) // per_prompt,
        lengths,
        Origin(backbone=BACKBONE, template="format:{prompt}{response}", data_hash="sha256:made"),
    )  # fmt: skip
