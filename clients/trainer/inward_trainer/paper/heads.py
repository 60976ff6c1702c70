"""Our heads, fitted by ``inward.offline`` on states that are read here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from inward.heads.base import BackboneRef, Head
from inward.heads.hybrid import HybridHead
from inward.offline.data.pairs import data_hash, grouped_folds, prompt_groups
from inward.offline.fit.hybrid import fit_hybrid
from inward.offline.fit.joint import Joint
from inward.offline.fit.probes import LayerProbes, fit_layer
from inward.offline.states.saved import Origin, PairStates
from inward.offline.states.scores import apply
from inward.types import Doubles, Floats, Reading
from inward_client.rows import Pair
from inward_trainer.paper.language_model import LanguageModel
from inward_trainer.paper.texts import encode_pairs

SHRINKAGE = 3.0
"""Of probes whose accuracy is only told, not used: c of ``offline.fit.probes``."""
FOLDS = 4


def pair_states(model: LanguageModel, pairs: Sequence[Pair]) -> PairStates:
    """States of all blocks at the end of both answers (position ``eos``)."""
    encoded = encode_pairs(model.tokeniser, pairs)
    states = model.states([one[0] for one in encoded] + [one[1] for one in encoded])
    n = len(pairs)
    return PairStates(
        states[:n],
        states[n:],
        tuple(range(1, model.layers + 1)),
        prompt_groups(pair.prompt for pair in pairs),
        np.array([len(c.answer_ids) - len(r.answer_ids) for c, r in encoded], dtype=np.float64),
        Origin(
            "eos",
            backbone=BackboneRef(name="paper", fingerprint="paper"),
            template=model.tokeniser.template,
            data_hash=data_hash(pairs),
        ),
    )


def fit_reward_head(states: PairStates, *, joint_steps: int, seed: int = 0) -> HybridHead:
    """The hybrid head (arXiv 2503.10093)."""
    joint = replace(Joint(), steps=joint_steps)
    return fit_hybrid(states, joint=joint, seed=seed, progress=False)[0]


def scores(head: Head, states_MLD: Floats) -> Doubles:
    """``[M]``: what a hybrid or LEGEND head says of states of all blocks, block 1 first."""
    values_MK = np.concatenate([apply(tap, states_MLD[:, tap.layer - 1]) for tap in head.readout.taps], axis=1)
    return np.array(head.score(Reading(values_MK)).scores_N, dtype=np.float64)


def layer_scores(head: HybridHead, states_MLD: Floats) -> Doubles:
    """``[L, M]``: each layer's probe of a hybrid head."""
    return np.stack([apply(tap, states_MLD[:, tap.layer - 1])[:, 0] for tap in head.readout.taps]).astype(np.float64)


def held_out_probes(states: PairStates) -> list[LayerProbes]:
    """A probe for each layer, whose ``held_out_CM[0]`` is of probes that had not seen the prompt."""
    parts = grouped_folds(states.groups_N, min(FOLDS, len(np.unique(states.groups_N))), 0)
    fold_N = np.empty(len(states), dtype=np.int64)
    for fold, (_, held_out) in enumerate(parts):
        fold_N[held_out] = fold
    span = 2 * len(states) <= states.width // 2
    return [fit_layer(states, axis, fold_N, len(parts), (SHRINKAGE,), span=span) for axis in range(len(states.layers))]
