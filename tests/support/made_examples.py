"""Examples whose truth is known: safe states stand apart from unsafe ones by so much, at each layer."""

from __future__ import annotations

import numpy as np

from inward.offline.data.pairs import grouped_folds
from inward.offline.evaluate.examples import of_lists, of_pairs
from inward.offline.evaluate.scoring import Judged


def pairs(n=80, strength=(0.3, 3.0, 1.0), width=12, per_prompt=2, seed=0, lengths=True):
    rng = np.random.default_rng(seed)
    rejected = rng.normal(size=(n, len(strength), width))
    chosen = rng.normal(size=rejected.shape) + np.array(strength)[None, :, None] * np.eye(width)[0]
    return of_pairs(
        chosen.astype(np.float32),
        rejected.astype(np.float32),
        layers=tuple(range(1, len(strength) + 1)),
        groups=np.arange(n) // per_prompt,
        length_difference=rng.integers(-20, 20, n) if lengths else None,
    )


def lists(g=30, size=5, strength=(0.3, 3.0), width=12, seed=0, **more):
    rng = np.random.default_rng(seed)
    list_of, safe = np.repeat(np.arange(g), size), rng.random(g * size) < 0.4
    states = rng.normal(size=(g * size, len(strength), width)) + np.outer(safe, strength)[:, :, None] * np.eye(width)[0]
    return of_lists(
        states.astype(np.float32),
        safe,
        list_of,
        np.arange(g),
        layers=tuple(range(1, len(strength) + 1)),
        prompt_states_GLD=rng.normal(size=(g, len(strength), width)).astype(np.float32),
        length=rng.integers(1, 50, g * size),
        text=[f"{'kind' if s else 'cruel'} words {i}" for i, s in enumerate(safe)],
        **more,
    )


def truth(examples, noise=0.0, seed=0):
    """Scores that know the label, but for so much noise."""
    scores = examples.safe_M + noise * np.random.default_rng(seed).normal(size=len(examples))
    return Judged(np.asarray(scores, dtype=np.float64))


def folds(examples, k=4):
    return grouped_folds(examples.prompt_M, k, 0)
