"""Whitened LEGEND heads: what is chosen, that nothing leaks, that the manifest says it, and real Llama-2 states."""

from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from inward.errors import DataError
from inward.heads import store
from inward.offline.data.pairs import grouped_folds, grouped_split
from inward.offline.fit.probes import auc, pair_accuracy
from inward.offline.fit.whitened import HELD_OUT, FromStates, fit_whitened
from inward.offline.states.moments import Moments
from inward.offline.states.saved import Origin
from inward.offline.states.stored import StoredPairs, Subset
from inward.types import Reading
from support.real_data import DATA
from support.small_heads import BACKBONE, pair_states


def fit(states, **options):
    return fit_whitened(FromStates.of(states), **options)


def scores(head, states):
    """``[2N]`` through the head's readout, as a backbone evaluates it."""
    both = np.concatenate(states.take(np.arange(len(states))))
    axes = [states.layers.index(layer) for layer in head.manifest.layers]
    values = np.concatenate(
        [
            both[:, axis] @ tap.weight_DK + (0 if tap.bias_K is None else tap.bias_K)
            for axis, tap in zip(axes, head.readout.taps, strict=True)
        ],
        axis=1,
    )
    return np.array(head.score(Reading(values.astype(np.float32))).scores_N)


def hidden(n=240, width=12, per_prompt=2, seed=0):
    """Layers whose loudest direction is noise that chosen and rejected do not share: the mean difference is misled."""
    states = pair_states(n=n, width=width, per_prompt=per_prompt, seed=seed, strength=(0.2, 1.5, 0.5))
    rng = np.random.default_rng(seed + 7)
    loud = np.zeros(width)
    loud[:2] = 1, 1
    noise = 6 * rng.normal(size=(2, n, 3, 1)) * loud
    return replace(
        states,
        chosen_NLD=(states.chosen_NLD + noise[0]).astype(np.float32),
        rejected_NLD=(states.rejected_NLD + noise[1]).astype(np.float32),
    )


def test_it_beats_the_mean_difference_where_noise_is_loud():
    states, fresh = hidden(), hidden(seed=1)
    whitened, report = fit(states, layer=2)
    mean = (states.chosen_NLD - states.rejected_NLD)[:, 1].mean(axis=0)
    plain = np.concatenate([fresh.chosen_NLD, fresh.rejected_NLD])[:, 1] @ mean
    assert pair_accuracy(scores(whitened, fresh)) > pair_accuracy(plain) + 0.1
    assert report.mahalanobis_cosine < report.cosine < 0.9, "their scores differ more than the vectors do"


def test_a_sweep_finds_the_layer_and_a_sum_weighs_the_layers():
    head, report = fit(hidden(), layer="sweep")
    assert head.manifest.layers == (2,) and head.tensors()["direction"].ndim == 1
    head, report = fit(hidden())
    assert head.manifest.layers == (1, 2, 3) and head.tensors()["direction"].shape == (3, 12)
    weights = [row.weight for row in report.sweep]
    assert weights[1] == max(weights) and sum(weights) == pytest.approx(1)


def test_scores_are_centred_on_the_responses_of_the_fit():
    states = hidden()
    for layer in (2, "sum"):
        both = scores(fit(states, layer=layer)[0], states)
        assert abs(both.mean()) < 0.02 * both.std()


def test_what_it_chose_and_what_it_is_judged_on_are_apart():
    """Exchanging chosen and rejected of the last fifth turns only their own agreement round."""
    states = hidden()
    _, last = grouped_split(states.groups_N, [1 - HELD_OUT, HELD_OUT], 0)
    rng = np.random.default_rng(0)
    noise = replace(states, rejected_NLD=states.chosen_NLD + rng.normal(size=states.chosen_NLD.shape).astype("f4"))
    _, report = fit(noise, layer="sweep")
    assert report.train > 0.55 and 0.3 < report.held_out < 0.7
    assert report.held_out_rows == len(last)


def test_few_kept_pairs_choose_and_all_make_the_directions():
    states = hidden(n=400)
    evidence = FromStates.of(states, most=60)
    assert 20 < len(evidence.kept) < 100 and not set(evidence.kept.groups_N) & set(
        np.delete(states.groups_N, evidence.index_N)
    )
    few, report = fit_whitened(evidence, layer=2, shrinkage=(1.0,))
    whole, _ = fit(states, layer=2, shrinkage=(1.0,))
    np.testing.assert_allclose(few.direction, whole.direction, atol=1e-5)
    assert (report.rows, report.judged) == (400, len(evidence.kept))


def test_another_covariance_is_used_and_named():
    states = hidden()
    round_one = Moments.empty(12)
    round_one.add(np.random.default_rng(3).normal(size=(5000, 12)).astype(np.float32))
    head, report = fit(states, covariance=[round_one] * 3, covariance_of="others.jsonl")
    assert report.cosine > 0.99 and head.manifest.options["covariance"] == "others.jsonl"


def test_validation_pairs_choose_in_place_of_left_out_ones():
    calibration = pair_states(strength=(3.0, 2.0, 0.5), seed=1)
    validation = pair_states(strength=(0.0, 0.2, 2.0), seed=2)
    head, report = fit(calibration, layer="sweep", validation=validation)
    assert head.manifest.layers == (3,) and report.held_out_rows < len(validation) / 2
    with pytest.raises(DataError, match="position"):
        fit(calibration, validation=replace(validation, origin=Origin("eos")))


def test_the_manifest_says_what_was_done_and_the_head_loads(tmp_path):
    head, report = fit(hidden(), name="mine", seed=4)
    options = head.manifest.options
    assert (options["direction"], options["c"], options["lambda"]) == ("whitened", report.c, list(report.lambda_))
    assert (options["cosine"], options["mahalanobis_cosine"]) == (report.cosine, report.mahalanobis_cosine)
    assert head.manifest.fit["metrics"]["direction"] == "whitened"
    loaded = store.load(store.save(head, tmp_path / "mine"), fingerprint=BACKBONE.fingerprint, width=12)
    np.testing.assert_array_equal(scores(loaded, hidden()), scores(head, hidden()))
    assert loaded.score(Reading(np.zeros((1, 3), np.float32))).probability_N[0] == pytest.approx(0.5, abs=0.2)


def test_same_states_and_seed_give_the_same_head():
    one, two = (fit(hidden(), seed=3)[0] for _ in range(2))
    assert np.array_equal(one.direction, two.direction) and one.manifest.fit == two.manifest.fit


def test_the_report_prints_every_figure():
    _, report = fit(hidden(), warnings=["mind the gap"])
    console = Console(width=120)
    with console.capture() as capture:
        console.print(report)
    text = capture.get()
    for part in (f"{report.held_out:.3f}", f"{report.cosine:.3f}", f"{report.c:g}", "warning: mind the gap"):
        assert part in text


def test_a_layer_that_is_not_there_is_named():
    with pytest.raises(DataError, match="layer 9"):
        fit(hidden(), layer=9)


@pytest.mark.skipif(not DATA.exists(), reason="needs the shared data folder with real Llama-2-7B states")
def test_on_real_llama_states_it_reaches_what_was_measured():
    """Five folds, near-duplicates on one side; every other layer of those that were published."""
    states = StoredPairs.open(DATA / "llama2_7b_states.safetensors")
    n = len(states)
    judged = np.empty(2 * n)
    for train, test in grouped_folds(states.groups_N, 5, 0):
        head, _ = fit(Subset(states, train), bootstraps=1)
        judged[np.concatenate([test, test + n])] = scores(head, Subset(states, test))
    assert pair_accuracy(judged) >= 0.90 and auc(judged) >= 0.88
