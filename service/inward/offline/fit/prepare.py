"""The manifest of a freshly fitted head, and its calibration."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from inward import __version__
from inward.errors import DataError
from inward.heads.base import BackboneRef, Manifest
from inward.heads.calibration import Acceptable, Deciles, MarginScale, Platt
from inward.offline.fit import seen_prompts
from inward.offline.fit.probes import labels
from inward.offline.states.saved import ListStates
from inward.offline.states.stored import PairSource
from inward.types import Doubles, Indices, Kind

UNKNOWN = "unknown"
"""Backbone and template of states that came without: such a head can be evaluated, but is never served."""


def manifest(
    name: str,
    kind: Kind,
    states: PairSource | ListStates,
    layers: Sequence[int],
    *,
    groups_N: Indices | None = None,
    seed: int,
    calibration: Mapping[str, Any],
    metrics: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
) -> Manifest:
    """Version 1 of a head, with what is needed to fit it again: data hash, seed and versions of what computed it.

    Args:
        layers: those that the head reads, out of ``states.layers``.
        groups_N: prompts of the rows that it was fitted on, where ``states`` are only some of them.
    """
    origin = states.origin
    if groups_N is None:
        groups_N = states.groups_G if isinstance(states, ListStates) else states.groups_N
    prompts = seen_prompts.dump(groups_N)
    return Manifest(
        name=name,
        kind=kind,
        version=1,
        created=created(),
        backbone=origin.backbone or BackboneRef(name=UNKNOWN, fingerprint=UNKNOWN),
        layers=tuple(layers),
        position=origin.position,
        # extraction sets it only where its last layer is the model's
        final_norm=origin.final_norm and max(states.layers) in layers,
        template=origin.template or UNKNOWN,
        calibration=dict(calibration),
        fit=record(origin.data_hash, len(groups_N), prompts, seed, metrics),
        options=dict(options or {}),
    )


def created() -> str:
    """Now, UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def record(data: str, rows: int, prompts: Mapping[str, Any], seed: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """``Manifest.fit``; ``prompts``: see ``seen_prompts.dump``."""
    versions = {"inward": __version__, "numpy": version("numpy"), "torch": version("torch")}
    known = {"data": data, "rows": rows, "prompts": dict(prompts), "seed": seed}
    return {**known, "versions": versions, "metrics": dict(metrics)}


def calibration(scores_M: Doubles) -> dict[str, Any]:
    """Probabilities of a response and of a pair's label, tenths of the scores, where acceptable ones lie, and the scale
    of margins.

    A pair and the same pair turned round say the same, so the pair's curve is fitted on both and passes through 1/2 at
    margin 0.

    Args:
        scores_M: ``[2N]``, of chosen and then of rejected responses, held out from the fit.
    """
    n = len(scores_M) // 2
    margins_N = scores_M[:n] - scores_M[n:]
    pair = Platt.fit(np.concatenate([margins_N, -margins_N]), labels(n))
    found: dict[str, Any] = {
        "platt": Platt.fit(scores_M, labels(n)).dump(),
        "platt_pair": {"slope": pair.slope, "intercept": 0.0},
    }
    found |= Deciles.fit(scores_M).dump() | Acceptable.fit(scores_M[:n]).dump()
    try:
        return found | MarginScale.fit(margins_N).dump()
    except DataError:  # too few margins above zero for bins: the report tells how bad the head is
        return found
