"""Fitting hybrid heads: what is learnt, that it is the same twice, that nothing leaks, and real Llama-2 states."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from inward.errors import DataError
from inward.offline.data.pairs import grouped_folds, load_pair_states
from inward.offline.fit.hybrid import cross_validate, fit_hybrid
from inward.offline.fit.joint import Joint
from inward.offline.fit.probes import (
    RECIPES,
    Coordinates,
    Recipe,
    Standardisation,
    auc,
    fit_probe,
    labels,
    pair_accuracy,
)
from inward.offline.states.saved import PairStates
from inward.types import Reading

LLAMA = Path(__file__).parents[2] / "../shared/data/llama2_7b_states.safetensors"
QUICK = {"recipes": (Recipe("least_squares", 3.0),), "joint": Joint(steps=20), "folds": 3, "progress": False}
SIGNAL = (0.0, 0.3, 1.0)


def pairs(n=60, d=40, seed=0, signal=SIGNAL, scale=(1.0, 30.0, 1000.0)):
    """Pairs that share their prompt's part and differ along one direction, at layers of very different norm."""
    rng = np.random.default_rng(seed)
    direction = np.random.default_rng(99).normal(size=d) / d**0.5
    shape = (n, len(signal), d)
    prompt = rng.normal(size=shape)
    step = 2 * np.array(signal)[:, None] * direction
    chosen, rejected = (prompt + rng.normal(size=shape) + sign * step for sign in (1, -1))
    size = np.array(scale)[:, None]
    layers = tuple(range(1, len(signal) + 1))
    return PairStates((chosen * size).astype(np.float32), (rejected * size).astype(np.float32), layers, np.arange(n))


def rewards(head, states):
    """``[2N]`` through the head's readout, as a backbone evaluates it."""
    both = np.concatenate([states.chosen_NLD, states.rejected_NLD])
    values = np.concatenate(
        [both[:, l] @ tap.weight_DK + tap.bias_K for l, tap in enumerate(head.readout.taps)], axis=1
    )
    return np.array(head.score(Reading(values.astype(np.float32))).scores_N)


def test_chosen_scores_higher_on_pairs_that_the_fit_never_saw():
    head, report = fit_hybrid(pairs(), **QUICK)
    fresh = rewards(head, pairs(seed=7))
    assert pair_accuracy(fresh) > 0.9 and auc(fresh) > 0.85
    assert report.accuracy > 0.85


def test_the_layer_with_the_signal_gets_the_weight():
    _, report = fit_hybrid(pairs(), **QUICK)
    assert report.best_layer.layer == 3
    weights = [row.weight for row in report.layers]
    assert weights[2] > 0.5 > weights[1] > weights[0] and sum(weights) == pytest.approx(1)


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
def test_probes_and_gate_are_trained_jointly(gate):
    head, report = fit_hybrid(pairs(), gate=gate, **QUICK)
    assert head.options.gate == gate and report.steps >= 5
    assert np.abs(head.gate_weight_LL).max() > 1e-4
    assert pair_accuracy(rewards(head, pairs(seed=7))) > 0.9


def test_same_data_and_seed_give_the_same_head_bit_for_bit():
    one, two = (fit_hybrid(pairs(), seed=3, **QUICK)[0] for _ in range(2))
    for name, tensor in one.tensors().items():
        assert np.array_equal(tensor, two.tensors()[name])
    assert one.manifest.fit == two.manifest.fit and one.manifest.calibration == two.manifest.calibration


def test_calibration_is_fitted_on_held_out_rewards():
    """Noise that a fit can memorise: probabilities of fresh noise must stay near one half."""
    head, _ = fit_hybrid(pairs(n=30, signal=(0.0,) * 3), **QUICK)
    scores = head.score(Reading(np.zeros((1, 3), dtype=np.float32)))
    assert abs(scores.probability_N[0] - 0.5) < 0.2
    assert abs(head.manifest.calibration["platt"]["slope"]) < 1.5


def test_head_is_calibrated_for_pairs_and_responses():
    head, _ = fit_hybrid(pairs(), **QUICK)
    assert {"platt", "platt_pair", "margin_std", "bin_edges", "bin_values"} <= head.manifest.calibration.keys()
    assert head.manifest.calibration["platt_pair"]["intercept"] == 0


def test_huge_float16_norms_are_standardised_without_overflow():
    states = pairs(scale=(1e3, 6e3, 1e4))
    head, _ = fit_hybrid(replace(states, chosen_NLD=states.chosen_NLD.astype(np.float16).astype(np.float32)), **QUICK)
    assert np.isfinite(rewards(head, states)).all()


def test_a_dimension_that_never_varies_does_no_harm():
    states = pairs()
    states.chosen_NLD[..., 0] = states.rejected_NLD[..., 0] = 5.0
    head, _ = fit_hybrid(states, **QUICK)
    assert head.probe_weight_LD[:, 0] == pytest.approx(0, abs=1e-6) and (head.scale_LD > 0).all()


def test_the_embedding_is_not_read():
    head, _ = fit_hybrid(replace(pairs(), layers=(0, 1, 2)), **QUICK)
    assert head.manifest.layers == (1, 2)
    with pytest.raises(DataError, match="embedding only"):
        fit_hybrid(replace(pairs(signal=(1.0,), scale=(1.0,)), layers=(0,)), **QUICK)


def test_one_prompt_is_too_few():
    states = pairs(n=5)
    with pytest.raises(DataError, match="prompts"):
        fit_hybrid(replace(states, groups_N=np.zeros(5, dtype=np.int64)), **QUICK)


def test_coordinates_are_exact_for_regularised_probes():
    """Fewer rows than dimensions: the same probe as in all dimensions."""
    states = pairs(n=12)
    standardisation = Standardisation.fit(states)
    coordinates = Coordinates.of(states, standardisation)
    z = standardisation.apply(np.concatenate([states.chosen_NLD, states.rejected_NLD])) / np.sqrt(40)
    for recipe in (Recipe("least_squares", 3.0), Recipe("logistic", 10.0), Recipe("logistic_pairs", 10.0)):
        u = np.stack([fit_probe(points, recipe) for points in coordinates.points_LMR])
        plain = np.stack([fit_probe(z[:, l].astype(np.float64), recipe) for l in range(3)]) / np.sqrt(40)
        np.testing.assert_allclose(coordinates.weight(u), plain, rtol=0, atol=1e-2 * np.abs(plain).max())


def test_cross_validation_does_not_learn_from_the_pairs_that_it_judges():
    """Labels without any signal: memorising shows as an accuracy far from one half."""
    held_out = cross_validate(
        pairs(n=80, signal=(0.0,) * 3), folds=4, **{k: v for k, v in QUICK.items() if k not in ("folds", "progress")}
    )
    assert 0.3 < pair_accuracy(held_out) < 0.7


def test_auc_and_accuracy_agree_with_their_definitions():
    scores = np.array([3.0, 1.0, 2.0, 2.0, 0.0, 2.0])
    assert pair_accuracy(scores) == pytest.approx((1 + 1 + 0.5) / 3)
    wins = [1.0 if c > r else 0.5 if c == r else 0.0 for c in scores[:3] for r in scores[3:]]
    assert auc(scores) == pytest.approx(np.mean(wins))
    assert list(labels(2)) == [1, 1, 0, 0]


def test_report_prints_every_layer_and_a_verdict():
    _, report = fit_hybrid(pairs(), **QUICK)
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(report)
    text = console.export_text()
    assert "best single layer" in text and all(f"\n{layer} " in text for layer in (1, 2, 3))
    assert report.metrics()["recipe"] == {"kind": "least_squares", "c": 3.0}


def test_recipes_offer_every_kind():
    assert {recipe.kind for recipe in RECIPES} == {"least_squares", "logistic", "svm", "logistic_pairs"}


@pytest.mark.skipif(
    not LLAMA.exists(), reason="needs the shared data folder with real Llama-2-7B states beside the repository"
)
def test_on_real_llama_states_the_hybrid_head_beats_a_mean_difference():
    states = load_pair_states(LLAMA)
    middle = [axis for axis, layer in enumerate(states.layers) if layer in (8, 16, 24, 32)]
    states = PairStates(
        states.chosen_NLD[:, middle], states.rejected_NLD[:, middle], (8, 16, 24, 32), states.groups_N, final_norm=True
    )
    (train, test), *_ = grouped_folds(states.groups_N, 3, 0)
    head, report = fit_hybrid(states.rows(train), **QUICK)
    fresh = rewards(head, states.rows(test))
    assert pair_accuracy(fresh) >= 0.82 and auc(fresh) >= 0.82
    assert report.auc > max(row.mean_difference_auc for row in report.layers)
