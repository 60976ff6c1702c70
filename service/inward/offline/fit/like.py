"""Fits a head like another one, on other states: for a cross-validation, or to see whether the old one still fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from inward.errors import SetupError
from inward.heads.base import Head
from inward.heads.ensemble import EnsembleHead
from inward.heads.hybrid import HybridHead
from inward.offline.data.pairs import grouped_folds
from inward.offline.fit.ensemble import Judges, fit_ensemble
from inward.offline.fit.hybrid import fit_hybrid
from inward.offline.fit.legend import fit_legend
from inward.offline.fit.probes import both
from inward.offline.fit.whitened import Choice, FromStates, fit_whitened
from inward.offline.states.scores import score_states
from inward.offline.states.stored import PairSource, SomeLayers, Subset, in_memory
from inward.types import Doubles, Kind

Like = Kind | Literal["whitened"]
"""What can be fitted: a kind of head, or a legend head with a whitened direction."""
FOLDS = 3


def like_of(head: Head) -> Like:
    """What kind of fit made a head."""
    return "whitened" if head.manifest.options.get("direction") == "whitened" else head.manifest.kind


def fit_like(like: Like, head: Head | None, pairs: PairSource, *, seed: int = 0) -> Head:
    """Fits a head on pairs.

    Args:
        head: one whose layers, gate and parts are kept; None: the defaults.

    Raises:
        DataError: the pairs lack one of the head's layers.
        SetupError: a kind that is not fitted on pairs, or an ensemble without a ``head``.
    """
    if head is not None and like != "ensemble":  # whose parts have layers of their own
        pairs = SomeLayers.of(pairs, head.manifest.layers)
    single = head.manifest.layers[0] if head and len(head.manifest.layers) == 1 else None
    match like:
        case "legend":
            return fit_legend(in_memory(pairs), layer="sweep" if single is None else single, seed=seed)[0]
        case "whitened":
            layer: Choice = "sum" if single is None else single
            return fit_whitened(FromStates.of(pairs), layer=layer, bootstraps=1, seed=seed)[0]
        case "hybrid":
            gate = head.options.gate if isinstance(head, HybridHead) else "sigmoid"
            return fit_hybrid(pairs, gate=gate, seed=seed, progress=False)[0]
        case "ensemble" if isinstance(head, EnsembleHead):
            return _ensemble_like(head, pairs, seed)
        case "ensemble":
            raise SetupError("to refit an ensemble, name one with --head: its parts say what to fit")
    raise SetupError(f"{like} heads are not fitted on pairs")


def left_out(pairs: PairSource, fit: Callable[[PairSource], Sequence[Head]], *, seed: int = 0) -> Doubles:
    """``[H, 2N]``: what the heads of ``fit``, fitted without the prompt, say of the chosen and then of the rejected
    responses.
    """
    rows, scores = [], []
    for train, held_out in grouped_folds(pairs.groups_N, FOLDS, seed):
        rows.append(both(held_out, len(pairs)))
        scores.append(score_states(Subset(pairs, held_out), fit(Subset(pairs, train))))
    return np.concatenate(scores, axis=1)[:, np.argsort(np.concatenate(rows))]


def _ensemble_like(head: EnsembleHead, pairs: PairSource, seed: int) -> Head:
    """Its parts fitted on all of the pairs, weighed by parts that were fitted on two thirds and judged on the rest."""

    def parts(some: PairSource) -> list[Head]:
        return [fit_like(like_of(part), part, some, seed=seed) for part in head.parts]

    return fit_ensemble(parts(pairs), left_out(pairs, parts, seed=seed), Judges(pairs.groups_N, ""), seed=seed)[0]
