"""How well an updated head still fits: the figure near one while it does, low once the states have moved."""

import numpy as np
import pytest

from inward.heads.base import BackboneRef, Manifest
from inward.heads.hybrid import HybridHead
from inward.heads.recent import KEPT_PAIRS, LEAST_PAIRS, RecentPairs, _left_out

L, D = 3, 24


def head(direction_LD):
    manifest = Manifest(
        name="hybrid",
        kind="hybrid",
        version=1,
        created="2025-01-01T00:00:00Z",
        template="t",
        layers=(1, 2, 3),
        backbone=BackboneRef(name="b", fingerprint="f"),
    )
    tensors = {
        "probe_weight": direction_LD,
        "probe_bias": np.zeros(L),
        "gate_weight": np.zeros((L, L)),
        "mean": np.zeros((L, D)),
        "scale": np.ones((L, D)),
    }
    return HybridHead.from_tensors(manifest, {name: t.astype(np.float32) for name, t in tensors.items()})


def pairs(direction_LD, n, seed=0):
    rng = np.random.default_rng(seed)
    noise_2NLD = rng.normal(size=(2, n, L, D))
    signs = np.array([1.0, -1.0])[:, None, None, None]
    return (noise_2NLD + 1.5 * signs * direction_LD).astype(np.float32)


@pytest.fixture
def direction_LD():
    made = np.random.default_rng(5).normal(size=(L, D))
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def test_a_head_that_fits_is_near_one_and_one_whose_states_moved_is_not(direction_LD):
    turned = np.roll(direction_LD, D // 2, axis=1)
    fits, drifted = RecentPairs(), RecentPairs()
    fits.add(*pairs(direction_LD, 100))
    drifted.add(*pairs(turned, 100))
    assert fits.cosine(head(direction_LD)) > 0.9
    assert abs(drifted.cosine(head(direction_LD))) < 0.5
    assert fits.cosine(head(-direction_LD)) < -0.9


def test_there_is_no_figure_of_too_few_pairs_nor_of_a_head_that_says_nothing(direction_LD):
    recent = RecentPairs()
    recent.add(*pairs(direction_LD, LEAST_PAIRS - 1))
    assert recent.cosine(head(direction_LD)) is None
    recent.add(*pairs(direction_LD, 1, seed=1))
    assert recent.cosine(head(direction_LD)) is not None
    assert recent.cosine(head(np.zeros((L, D)))) is None


def test_only_the_last_pairs_count_and_other_layers_begin_anew(direction_LD):
    recent = RecentPairs()
    recent.add(*pairs(-direction_LD, KEPT_PAIRS))
    recent.add(*pairs(direction_LD, KEPT_PAIRS, seed=1))
    assert recent.cosine(head(direction_LD)) > 0.9
    recent.add(*pairs(direction_LD, 5)[:, :, :2])
    assert recent.cosine(head(direction_LD)) is None


def test_a_pair_is_scored_by_a_fit_without_it(direction_LD):
    chosen, rejected = pairs(direction_LD, 12)
    z_MLD = np.concatenate([chosen, rejected])
    scores_M = next(_left_out(z_MLD))
    z_MD = (z_MLD[:, 0] - z_MLD[:, 0].mean(axis=0)).astype(np.float64)
    strength = np.trace(z_MD @ z_MD.T) / D
    without = np.ones(24, dtype=bool)
    without[[3, 15]] = False
    y_M = np.repeat([1.0, -1.0], 12)
    kernel = z_MD[without] @ z_MD[without].T + strength * np.eye(22)
    expected = z_MD[[3, 15]] @ z_MD[without].T @ np.linalg.solve(kernel, y_M[without])
    assert scores_M[3] / scores_M[15] == pytest.approx(expected[0] / expected[1], rel=1e-4)
