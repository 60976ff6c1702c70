"""Rankers (``offline.fit.rankers``), cross-validated over prompts: each list is ranked by one that never saw it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from inward.offline.data.pairs import grouped_folds, grouped_split
from inward.offline.fit.rankers import Lists, Scorer, ScorerKind, Settings, held_out, train
from inward.offline.fit.reproducible import reproducible
from inward.offline.states.saved import ListStates
from inward.types import Doubles, Indices

FOLDS = 5
PATIENCE = 10
"""Epochs without a lower loss on a fifth of the training lists, after which a ranker stops."""


@dataclass(frozen=True, slots=True)
class Fold:
    """A trained scorer and the lists that it has not seen."""

    scorer: Scorer
    test_G: Indices


def mixed(states: ListStates) -> Indices:
    """``[G]``: the lists that have both a safe and an unsafe answer."""
    kinds = [len(np.unique(states.safe_M[states.group_M == g])) for g in range(len(states))]
    return np.flatnonzero(np.array(kinds) == 2)


def cross_fitted(states: ListStates, kind: ScorerKind, layer: int, *, epochs: int, seed: int) -> list[Fold]:
    """A scorer for each fold. How long it trains is decided by a part of its own training lists."""
    lists, settings = Lists(states, layer), Settings(epochs=epochs)
    folds, parts = [], grouped_folds(states.groups_G, min(FOLDS, len(np.unique(states.groups_G))), seed)
    with reproducible(seed):
        for fold, (train_G, test_G) in enumerate(parts):
            fit, check = (train_G[part] for part in grouped_split(states.groups_G[train_G], [0.8, 0.2], seed))
            scorer, rng = lists.scorer(kind, fit, settings), np.random.default_rng([seed, fold])
            folds.append(Fold(_trained(scorer, lists, fit, check, settings, rng), test_G))
    return folds


def ranked(folds: list[Fold], states: ListStates, layer: int) -> Doubles:
    """``[M]``: scores of all answers, each by the scorer that has not seen its prompt; of other states of the same
    lists, too.
    """
    lists = Lists(states, layer)
    scores_M = np.empty(len(states.safe_M))
    for fold in folds:
        _, scores, rows = held_out(fold.scorer, lists, fold.test_G)
        scores_M[rows] = scores
    return scores_M


def top_is_safe(states: ListStates, scores_M: Doubles) -> Doubles:
    """``[G]``: whether the highest score of each list is a safe answer's."""
    rows = [np.flatnonzero(states.group_M == g) for g in range(len(states))]
    return np.array([float(states.safe_M[row[np.argmax(scores_M[row])]]) for row in rows])


def _trained(
    scorer: Scorer, lists: Lists, fit: Indices, check: Indices, settings: Settings, rng: np.random.Generator
) -> Scorer:
    best, kept, waited = np.inf, copy.deepcopy(scorer.state_dict()), 0
    for _, _ in zip(range(settings.epochs), train(scorer, lists, fit, settings, rng), strict=False):
        loss = held_out(scorer, lists, check)[0]
        waited += 1
        if loss < best:
            best, kept, waited = loss, copy.deepcopy(scorer.state_dict()), 0
        elif waited >= PATIENCE:
            break
    scorer.load_state_dict(kept)
    return cast(Scorer, cast(torch.nn.Module, scorer).eval())
