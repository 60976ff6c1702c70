"""How well heads still fit: the policy moves, and so do the states that they read."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from inward.backbones.base import Backbone
from inward.errors import DataError, InwardError, SetupError
from inward.heads.base import Head
from inward.offline.data.pairs import read_pairs
from inward.offline.fit.like import fit_like, left_out, like_of
from inward.offline.fit.probes import pair_accuracy
from inward.offline.states.read import store_pairs
from inward.offline.states.scores import score_states
from inward.offline.states.stored import PairSource, StoredPairs
from inward.prompts import Prompts
from inward.types import Position


@dataclass(frozen=True, slots=True)
class Drift:
    """How well a head still fits recent states."""

    pairs: int
    cosine: float
    """Of the head and one like it fitted on these states, in the metric of their covariance (Mahalanobis): the
    correlation of the scores that the two give these responses. 1: nothing has changed.
    """
    accuracy: float
    """Pair accuracy of the head on these pairs."""
    refitted_accuracy: float
    """Of heads like it, each fitted without the fold that it is judged on."""


def drift(head: Head, states: PairSource) -> Drift:
    """Compares a head with heads like it that are fitted on ``states``.

    Raises:
        DataError: the states lack what the head reads.
        SetupError: the head ranks lists.
    """
    if head.manifest.kind == "srr":
        raise SetupError("it ranks lists, and these are pairs")
    [own_M] = score_states(states, [head])
    if not np.isfinite(own_M).all():
        raise DataError("it gives some of these responses no finite score")

    def refitted(some: PairSource) -> list[Head]:
        return [fit_like(like_of(head), head, some)]

    [refitted_M] = score_states(states, refitted(states))
    [left_out_M] = left_out(states, refitted)
    cosine = float(np.corrcoef(own_M, refitted_M)[0, 1])
    return Drift(len(states), cosine, pair_accuracy(own_M), pair_accuracy(left_out_M))


def of_states(heads: Mapping[Path, Head], path: Path) -> dict[Path, dict[str, Any]]:
    """For each head its ``Drift`` on saved states, as JSON, or ``why`` there is none."""
    states = StoredPairs.open(path)
    return {folder: _told(head, states) for folder, head in heads.items()}


async def of_pairs(
    backbone: Backbone, prompts: Prompts, heads: Mapping[Path, Head], path: Path
) -> dict[Path, dict[str, Any]]:
    """The same on texts: their states are read where the heads read them."""
    pairs = read_pairs(path)
    found: dict[Path, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="inward-") as scratch:
        for position, final_norm in sorted({_where(head) for head in heads.values()}):
            here = {folder: head for folder, head in heads.items() if _where(head) == (position, final_norm)}
            layers = sorted({layer for head in here.values() for layer in head.manifest.layers})
            file = Path(scratch) / f"{position}-{final_norm}.safetensors"
            states = await store_pairs(
                backbone, prompts, pairs, file, layers=layers, position=position, final_norm=final_norm
            )
            found |= {folder: _told(head, states) for folder, head in here.items()}
    return found


def _where(head: Head) -> tuple[Position, bool]:
    return head.manifest.position, head.manifest.final_norm


def _told(head: Head, states: PairSource) -> dict[str, Any]:
    try:
        return asdict(drift(head, states))
    except InwardError as error:
        return {"why": error.message}
