"""Fitting hybrid heads: what is learnt, that it is the same twice, that nothing leaks, and real Llama-2 states."""

import io
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from inward.errors import DataError
from inward.heads.held_out import HeldOut
from inward.offline.data.pairs import grouped_folds
from inward.offline.fit.hybrid import fit_hybrid
from inward.offline.fit.joint import Joint, Training
from inward.offline.fit.like import left_out
from inward.offline.fit.probes import auc, both, fit_layer, labels, pair_accuracy
from inward.offline.states.saved import Origin, PairStates, load_states, save_states
from inward.offline.states.stored import StoredPairs
from inward.types import Reading
from support.real_data import DATA
from support.small_heads import pair_states

LLAMA = DATA / "llama2_7b_states.safetensors"
QUICK = {"shrinkage": (1.0,), "joint": Joint(steps=20), "folds": 3, "progress": False}
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


def test_in_the_span_of_few_rows_probes_are_the_same():
    """Fewer rows than dimensions: the same outputs as in all dimensions."""
    states = pairs(n=12)
    folds = np.arange(12) % 3
    spanned, full = (fit_layer(states, 2, folds, 3, (0.3, 3.0), span=span) for span in (True, False))
    np.testing.assert_allclose(spanned.held_out_CM, full.held_out_CM, atol=2e-3)
    np.testing.assert_allclose(spanned.difference_M, full.difference_M, atol=2e-3)
    weights = np.einsum("dr,fcr->fcd", spanned.basis_DR, spanned.probe_FCR)
    np.testing.assert_allclose(weights, full.probe_FCR, atol=2e-3 * np.abs(full.probe_FCR).max())


def test_a_probe_is_the_ridge_regression_of_its_own_rows():
    states = pairs(n=60)
    folds = np.arange(60) % 3
    layer = fit_layer(states, 2, folds, 3, (1.0,), span=False)
    own = both(np.flatnonzero(folds != 0), 60)
    z = ((np.concatenate([states.chosen_NLD, states.rejected_NLD])[:, 2] - layer.mean_D) / layer.scale_D)[own]
    z = z.astype(np.float64) - z.mean(axis=0, dtype=np.float64)
    covariance = z.T @ z / len(z)
    ridge = np.linalg.solve(covariance + np.trace(covariance) / 40 * np.eye(40), z.T @ (labels(40) - 0.5))
    probe = layer.probe_FCR[0, 0].astype(np.float64)
    assert probe @ ridge / np.linalg.norm(probe) / np.linalg.norm(ridge) == pytest.approx(1, abs=1e-6)
    assert (z @ probe).std() == pytest.approx(1, abs=1e-3)


def test_a_fold_is_judged_by_probes_that_have_not_seen_it():
    """Exchanging chosen and rejected of one fold turns its held-out outputs round, and no other probe's view of it."""
    states = pairs(n=30)
    folds = np.arange(30) % 3
    first = folds == 0
    turned = replace(
        states,
        chosen_NLD=np.where(first[:, None, None], states.rejected_NLD, states.chosen_NLD),
        rejected_NLD=np.where(first[:, None, None], states.chosen_NLD, states.rejected_NLD),
    )
    one, two = (fit_layer(source, 2, folds, 3, (1.0,), span=False) for source in (states, turned))
    np.testing.assert_allclose(two.probe_FCR[0], one.probe_FCR[0], atol=1e-4)
    chosen, rejected = one.held_out_CM[:, :30], one.held_out_CM[:, 30:]
    np.testing.assert_allclose(two.held_out_CM[:, :30][:, first], rejected[:, first], atol=1e-3)
    np.testing.assert_allclose(two.held_out_CM[:, 30:][:, first], chosen[:, first], atol=1e-3)


def test_states_in_a_file_give_the_same_head(tmp_path):
    states = pairs(n=30, d=24)
    save_states(states, tmp_path / "s.safetensors")
    one, _ = fit_hybrid(states, **QUICK)
    two, _ = fit_hybrid(StoredPairs.open(tmp_path / "s.safetensors"), **QUICK)
    for name, tensor in one.tensors().items():
        assert np.array_equal(tensor, two.tensors()[name])


def test_states_that_are_not_held_in_memory_give_the_same_head(monkeypatch):
    states = pairs(n=60, d=24)
    one, _ = fit_hybrid(states, **QUICK)
    monkeypatch.setattr("inward.offline.fit.joint.CACHE_BYTES", 0)
    monkeypatch.setattr("inward.offline.fit.probes._ROWS_BYTES", 0)
    monkeypatch.setattr("inward.offline.states.stored.BLOCK_BYTES", 4000)
    two, _ = fit_hybrid(states, **QUICK)
    for name, tensor in one.tensors().items():
        np.testing.assert_allclose(tensor, two.tensors()[name], atol=1e-3 * max(1.0, float(np.abs(tensor).max())))


def test_an_interrupted_fit_goes_on_where_it_was(tmp_path, monkeypatch):
    states = pairs(n=60, d=24)
    wanted, _ = fit_hybrid(states, **QUICK)
    monkeypatch.setattr("inward.offline.fit.joint.CHECKPOINT_S", 0.0)
    step, taken = Training._step, []

    def dies(self, index):
        if len(taken) == 12:
            raise KeyboardInterrupt
        taken.append(index)
        step(self, index)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Training, "_step", dies)
        fit_hybrid(states, **QUICK, cache=tmp_path)
    layers = monkeypatch.context()
    with layers as patch:
        patch.setattr("inward.offline.fit.hybrid.fit_layer", None)  # probes are not fitted again
        patch.setattr(Training, "_step", lambda self, index: (taken.append(index), step(self, index)))
        got, _ = fit_hybrid(states, **QUICK, cache=tmp_path)
    assert len(taken) == 12 + 10, "from the checkpoint at step 10"
    for name, tensor in wanted.tensors().items():
        assert np.array_equal(tensor, got.tensors()[name])


def test_minibatches_of_many_pairs_learn_as_well():
    states = pairs(n=300)
    head, report = fit_hybrid(states, **{**QUICK, "joint": Joint(batch=32, steps=40)})
    assert pair_accuracy(rewards(head, pairs(n=100, seed=7))) > 0.9 and report.accuracy > 0.9


def test_rewards_of_different_prompts_stay_comparable():
    """The margin loss alone lets the rewards of all responses drift together."""
    states = pairs(n=60, signal=(0.1, 0.1, 0.3))
    head, _ = fit_hybrid(states, **{**QUICK, "joint": Joint(steps=200, patience=100, tolerance=0.0)})
    fresh = rewards(head, pairs(n=100, signal=(0.1, 0.1, 0.3), seed=7))
    assert abs(fresh.mean()) < 0.35 * fresh.std()


def test_cross_validation_does_not_learn_from_the_pairs_that_it_judges():
    """Labels without any signal: memorising shows as an accuracy far from one half."""
    [held_out] = left_out(pairs(n=80, signal=(0.0,) * 3), lambda some: [fit_hybrid(some, **QUICK)[0]])
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
    assert report.metrics()["c"] == 1.0


@pytest.mark.skipif(
    not LLAMA.exists(), reason="needs the shared data folder with real Llama-2-7B states beside the repository"
)
def test_on_real_llama_states_the_hybrid_head_beats_a_mean_difference():
    states = load_states(LLAMA)
    middle = [axis for axis, layer in enumerate(states.layers) if layer in (8, 16, 24, 32)]
    states = PairStates(
        states.chosen_NLD[:, middle],
        states.rejected_NLD[:, middle],
        (8, 16, 24, 32),
        states.groups_N,
        origin=Origin(final_norm=True),
    )
    (train, test), *_ = grouped_folds(states.groups_N, 3, 0)
    head, report = fit_hybrid(states.rows(train), **QUICK)
    fresh = rewards(head, states.rows(test))
    assert pair_accuracy(fresh) >= 0.82 and auc(fresh) >= 0.82
    assert report.auc > max(row.mean_difference_auc for row in report.layers)


def test_an_interval_is_of_the_pairs_that_were_judged(monkeypatch):
    monkeypatch.setattr("inward.offline.fit.hybrid.JUDGED_PAIRS", 20)
    head, report = fit_hybrid(pair_states(60), joint=Joint(steps=2), progress=False)
    assert report.pairs == 60 and 15 <= report.judged < 30
    held_out = HeldOut.of(head.manifest.fit)
    assert held_out is not None and (held_out.pairs, held_out.agreement) == (report.judged, report.accuracy)


def test_of_two_pairs_that_are_both_right_little_is_said_to_be_known():
    states = pair_states(2, per_prompt=1, strength=(9.0, 9.0, 9.0))
    _, report = fit_hybrid(states, joint=Joint(steps=2), progress=False)
    assert report.accuracy == 1.0
    assert report.verdict.endswith("the 95 % interval of the head's accuracy is 0.342 to 1.000")


def test_layers_are_judged_by_the_pairs_that_judge_the_head(monkeypatch):
    """One layer's probe and the sum of one layer, before they are trained, say the same."""
    monkeypatch.setattr("inward.offline.fit.hybrid.JUDGED_PAIRS", 20)
    states = pair_states(200, layers=(1,), strength=(0.7,))
    _, report = fit_hybrid(states, joint=Joint(steps=2), progress=False)
    [layer] = report.layers
    assert report.judged < 40
    assert (layer.accuracy, layer.auc) == pytest.approx((report.warm_start_accuracy, report.warm_start_auc))
