"""Ensembles: weights that help, never one that hurts more than chance, and a head that serves."""

import numpy as np
import pytest

from inward.errors import DataError
from inward.heads import store
from inward.offline.data.pairs import grouped_folds
from inward.offline.fit.ensemble import Judges, fit_ensemble, fit_weights
from inward.offline.fit.hybrid import fit_hybrid
from inward.offline.fit.joint import Joint
from inward.offline.fit.legend import fit_legend
from inward.offline.fit.probes import auc, both, pair_accuracy
from inward.offline.fit.whitened import FromStates, fit_whitened
from inward.offline.states.scores import score_states
from inward.offline.states.stored import StoredPairs, Subset
from support.real_data import DATA
from support.small_heads import BACKBONE, pair_states

QUICK = {"joint": Joint(steps=20), "folds": 3, "progress": False}


def made(n=300, noise=(1.0, 1.0, 5.0), seed=0):
    """Scores ``[P, 2N]`` that know the label, each with noise of its own."""
    rng = np.random.default_rng(seed)
    truth = np.concatenate([np.ones(n), np.zeros(n)])
    return np.stack([truth + size * rng.normal(size=2 * n) for size in noise]) * 3 + 7


def test_the_sum_beats_its_parts_and_noise_gets_little_weight():
    scores = made()
    found = fit_weights(scores, np.arange(300) // 2)
    assert pair_accuracy(found.held_out_M) > max(pair_accuracy(one) for one in scores) + 0.02
    assert found.weight_P[2] < 0.7 * found.weight_P[:2].min()
    assert (found.weight_P >= 0).all()


def test_a_part_that_is_far_better_may_stand_alone():
    found = fit_weights(made(noise=(0.2, 6.0, 6.0)), np.arange(300))
    assert pair_accuracy(found.held_out_M) >= pair_accuracy(made(noise=(0.2, 6.0, 6.0))[0]) - 0.005


def test_sums_have_the_scale_that_confidence_is_meant_for():
    scores = made()
    found = fit_weights(scores, np.arange(300))
    z = (scores - found.centre_P[:, None]) / found.spread_P[:, None]
    assert (found.weight_P @ z).std() == pytest.approx(1) and (found.weight_P @ z).mean() == pytest.approx(0, abs=1e-9)


def heads(states):
    return [
        fit_whitened(FromStates.of(states), name="white", layer=2)[0],
        fit_hybrid(states, name="gated", **QUICK)[0],
        fit_legend(states, name="plain", layer=2)[0],
    ]


def test_fitted_heads_become_one_that_loads_and_scores_the_same(tmp_path):
    states, others = pair_states(seed=1), pair_states(seed=2)
    parts = heads(states)
    scores = score_states(others, parts)
    head, report = fit_ensemble(parts, scores, Judges(1000 + others.groups_N, "sha256:others"), name="both")
    assert head.manifest.position == "last" and head.manifest.layers == (1, 2, 3)
    loaded = store.load(store.save(head, tmp_path / "both"), fingerprint=BACKBONE.fingerprint, width=12)
    [sums] = score_states(others, [loaded])
    assert report.accuracy == pytest.approx(pair_accuracy(sums), abs=0.03)
    assert report.accuracy >= max(part.accuracy for part in report.parts) - 0.02
    assert not report.warnings and {"platt", "platt_pair", "score_deciles"} <= head.manifest.calibration.keys()


def test_heads_fitted_on_the_same_pairs_are_warned_of():
    states = pair_states(first=2**62)  # as hashes of prompts are
    parts = heads(states)
    _, report = fit_ensemble(parts, score_states(states, parts), Judges(states.groups_N, states.origin.data_hash))
    assert len(report.warnings) == 3 and "flatters" in report.warnings[0]
    first = states.rows(np.arange(60))
    _, report = fit_ensemble(parts, score_states(first, parts), Judges(first.groups_N, "sha256:first"))
    assert report.warnings[0] == "20 of 20 prompts were in the fit of head 'white', which flatters its weight"


def test_one_head_or_a_score_that_is_no_number_is_refused():
    parts = heads(pair_states())
    with pytest.raises(DataError, match="two heads"):
        fit_ensemble(parts[:1], np.zeros((1, 240)), Judges(np.arange(120), ""))
    with pytest.raises(DataError, match="finite"):
        fit_ensemble(parts, np.full((3, 240), np.nan), Judges(np.arange(120), ""))


@pytest.mark.skipif(not DATA.exists(), reason="needs the shared data folder with real Llama-2-7B states")
def test_on_real_llama_states_the_sum_is_no_worse_than_its_best_part():
    """Three folds; inside each, weights come from heads of two inner folds, and are used on heads of all of it."""
    states = StoredPairs.open(DATA / "llama2_7b_states.safetensors")
    n = len(states)
    judged = np.empty((3, 2 * n))

    def parts(some):
        white = fit_whitened(FromStates.of(some), bootstraps=1)[0]
        return [white, fit_hybrid(some, progress=False)[0]]

    for train, test in grouped_folds(states.groups_N, 3, 0):
        inner = np.empty((2, 2 * len(train)))
        for fit_on, judge_on in grouped_folds(states.groups_N[train], 2, 0):
            inner[:, both(judge_on, len(train))] = score_states(
                Subset(states, train[judge_on]), parts(Subset(states, train[fit_on]))
            )
        found = fit_weights(inner, states.groups_N[train])
        scores = score_states(Subset(states, test), parts(Subset(states, train)))
        judged[:2, both(test, n)] = scores
        judged[2, both(test, n)] = found.weight_P @ ((scores - found.centre_P[:, None]) / found.spread_P[:, None])
    for name, one in zip(("whitened", "hybrid", "sum"), judged, strict=True):
        print(name, f"{pair_accuracy(one):.3f} {auc(one):.3f}")
    # A hundredth is two pairs.
    assert pair_accuracy(judged[2]) >= max(pair_accuracy(one) for one in judged[:2]) - 0.01
    assert auc(judged[2]) >= max(auc(one) for one in judged[:2]) - 0.01
