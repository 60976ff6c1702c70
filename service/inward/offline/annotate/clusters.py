"""Where contradicted labels gather: clusters of what pairs are about, by the model's own states, each with its share of
wrong labels and three examples.

A pair is the mean of the states of its two answers, each a mean over its tokens at the middle layer: what both have in
common, not what tells them apart. k-means on the first principal components.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from inward.offline.annotate.duplicates import hashed, text_of
from inward.offline.annotate.noise import Noise, noise
from inward.offline.annotate.quality import percent
from inward.offline.annotate.summary import Picked
from inward.types import Doubles, Floats
from inward_client.rows import as_turns

MOST_PAIRS = 2000
"""Whose states are read: a sample."""
COMPONENTS = 32
EXAMPLES = 3
SHOWN = 100
"""Characters of an example's prompt."""


@dataclass(frozen=True, slots=True, eq=False)
class Cluster:
    """Pairs about similar things."""

    pairs: int
    contradicted: int
    noise: Noise | None
    """None of too few prompts, or where the head can't judge."""
    examples: tuple[Picked, ...]
    """Contradicted ones first, the nearest to the middle."""

    def to_json(self) -> dict[str, Any]:
        """For ``--json`` and the metadata; examples by source and row."""
        return {
            "pairs": self.pairs, "contradicted": self.contradicted,
            "wrong": self.noise.wrong.to_json() if self.noise else None,
            "examples": [{"source": one.source, "row": one.row} for one in self.examples],
        }  # fmt: skip

    def text(self) -> Iterator[str]:
        """Lines for the terminal."""
        wrong = f"; wrong, estimated: {percent(self.noise.wrong)}" if self.noise else ""
        yield f"  {self.pairs:,} pairs, {self.contradicted / self.pairs:.1%} contradicted{wrong}"
        for one in self.examples:
            said = " ".join(as_turns(one.pair.prompt)[-1]["content"].split())
            short = said if len(said) <= SHOWN else said[: SHOWN - 1] + "…"
            yield f"    {one.source}, row {one.row} (margin {one.columns['margin']:.2f}): {short}"


def cluster(pairs: Sequence[Picked], states_ND: Floats, k: int, *, judges: bool = True) -> list[Cluster]:
    """At most ``k`` clusters, those with the largest share of contradicted labels first.

    Args:
        pairs: annotated, ties not among them.
        states_ND: of each pair.
        judges: whether the head is shown to judge, so that shares of wrong labels are estimated.
    """
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA

    n = len(pairs)
    if n < 2:
        return []
    spread_ND = (states_ND - states_ND.mean(axis=0)) / np.maximum(states_ND.std(axis=0), 1e-6)
    points_NC = spread_ND[:, :1]  # of states that are all the same
    if spread_ND.any():
        points_NC = PCA(min(COMPONENTS, n - 1, states_ND.shape[1]), random_state=0).fit_transform(spread_ND)
    distinct = len(np.unique(points_NC, axis=0))
    means = KMeans(min(k, distinct), n_init=4, random_state=0).fit(points_NC)
    away_N = np.linalg.norm(points_NC - means.cluster_centers_[means.labels_], axis=1)
    margin_N = np.array([float(one.columns["margin"] or 0.0) for one in pairs])
    found = [
        _cluster(pairs, np.flatnonzero(means.labels_ == label), margin_N, away_N, judges)
        for label in np.unique(means.labels_)  # pairs that are nearly the same may leave a centre without any
    ]
    return sorted(found, key=lambda one: -one.contradicted / one.pairs)


def _cluster(pairs: Sequence[Picked], rows: Any, margin_N: Doubles, away_N: Doubles, judges: bool) -> Cluster:
    groups = np.array([hashed(text_of(pairs[i].pair.prompt)) for i in rows], dtype=np.int64)
    order = sorted(rows, key=lambda i: (margin_N[i] >= 0, away_N[i]))
    prompts: dict[str, int] = {}
    for i in order:  # three different prompts, where there are as many
        prompts.setdefault(text_of(pairs[i].pair.prompt), i)
    against = int((margin_N[rows] < 0).sum())
    found = noise(margin_N[rows], groups) if judges else None
    return Cluster(len(rows), against, found, tuple(pairs[i] for i in list(prompts.values())[:EXAMPLES]))
