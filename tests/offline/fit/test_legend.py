import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from inward.errors import DataError
from inward.heads import store
from inward.offline.data.pairs import CalibrationRow, Pair, grouped_split
from inward.offline.fit.legend import HELD_OUT, constant_refusal, fit_legend
from inward.offline.states.saved import Origin
from inward.types import Reading
from support.small_heads import BACKBONE, pair_states


def margin(head, chosen_D, rejected_D):
    values = np.stack([chosen_D, rejected_D]) @ head.readout.taps[0].weight_DK
    return head.score(Reading(values.astype(np.float32)), pair=True).pair


def test_the_direction_is_the_unit_mean_difference():
    states = pair_states()
    head, _ = fit_legend(states, layer=2)
    mean = (states.chosen_NLD - states.rejected_NLD)[:, 1].mean(axis=0)
    np.testing.assert_allclose(head.direction, mean / np.linalg.norm(mean), atol=1e-6)
    assert head.direction[0] > 0.95, "the axis along which the states were made to differ"


def test_safer_chosen_answers_get_positive_margins():
    states = pair_states()
    head, _ = fit_legend(states, layer=2)
    safe = np.eye(12, dtype=np.float32)[0]
    assert margin(head, 3 * safe, -3 * safe).label_agrees is True
    assert margin(head, 3 * safe, -3 * safe).bin == 1.0
    assert margin(head, -safe, safe).margin < 0


def test_the_last_layer_is_the_default_and_a_sweep_finds_the_layer_that_separates():
    assert fit_legend(pair_states())[1].layer == 3
    head, report = fit_legend(pair_states(), layer="sweep")
    assert head.manifest.layers == (2,)
    assert report.layer == 2
    assert [row.layer for row in report.sweep] == [1, 2, 3]
    assert report.sweep[1].validation > report.sweep[0].validation


def test_same_data_and_seed_give_the_same_head_and_rows_in_another_order_too():
    states = pair_states()
    head, report = fit_legend(states, layer="sweep", seed=3)
    again, report_again = fit_legend(states, layer="sweep", seed=3)
    assert np.array_equal(head.direction, again.direction)
    assert (head.manifest.calibration, report) == (again.manifest.calibration, report_again)
    shuffled, report_shuffled = fit_legend(
        states.rows(np.random.default_rng(0).permutation(len(states))), layer="sweep", seed=3
    )
    np.testing.assert_allclose(shuffled.direction, head.direction, atol=1e-6)
    assert report_shuffled.held_out == report.held_out


def test_nothing_is_fitted_on_what_the_held_out_agreement_is_counted_on():
    """Exchanging chosen and rejected in the held-out rows turns their agreement round and leaves everything before
    it alone."""
    states = pair_states(strength=(0.2, 1.0, 0.5))
    _, held_out = grouped_split(states.groups_N, [1 - HELD_OUT, HELD_OUT], 0)
    chosen, rejected = states.chosen_NLD.copy(), states.rejected_NLD.copy()
    chosen[held_out], rejected[held_out] = states.rejected_NLD[held_out], states.chosen_NLD[held_out]
    _, before = fit_legend(states, layer="sweep")
    _, after = fit_legend(replace(states, chosen_NLD=chosen, rejected_NLD=rejected), layer="sweep")
    assert after.sweep == before.sweep
    assert after.held_out == pytest.approx(1 - before.held_out)
    assert before.held_out_rows == len(held_out)


def test_without_signal_only_the_training_agreement_is_flattered():
    _, report = fit_legend(pair_states(n=300, width=400, per_prompt=1, strength=(0, 0, 0)), layer=2)
    assert report.train > 0.8
    assert 0.35 < report.validation < 0.65
    assert 0.3 < report.held_out < 0.7
    assert report.stability < 0.9


def test_bins_fit_new_pairs_since_the_margins_were_cross_fitted():
    states = pair_states(n=600, width=300, per_prompt=1, strength=(0, 1.5, 0))
    half = np.arange(600) < 150
    head, _ = fit_legend(states.rows(np.flatnonzero(half)), layer=2)
    chosen, rejected = states.rows(np.flatnonzero(~half)).at(2)
    bins = [margin(head, c, r) for c, r in zip(chosen, rejected, strict=True)]
    share_of_highest = np.mean([b.bin == 1.0 for b in bins if b.label_agrees])
    assert 0.15 < share_of_highest < 0.35


def test_validation_pairs_say_how_large_a_margin_is():
    """Refusals are far from harmful answers; pairs as they are annotated are not, and their bins must differ, too."""
    calibration = pair_states(strength=(0.0, 0.0, 9.0), seed=1)
    validation = pair_states(strength=(0.0, 0.0, 1.0), seed=2)
    head, _ = fit_legend(calibration, layer=3, validation=validation)
    own, _ = fit_legend(calibration, layer=3)
    assert max(head.manifest.calibration["bin_edges"]) < min(own.manifest.calibration["bin_edges"])
    assert head.manifest.calibration["platt_pair"]["slope"] > 0


def test_validation_pairs_choose_the_layer_and_give_the_agreement():
    calibration = pair_states(strength=(3.0, 2.0, 0.5), seed=1)
    validation = pair_states(strength=(0.0, 0.2, 2.0), seed=2)
    head, report = fit_legend(calibration, layer="sweep", validation=validation)
    assert head.manifest.layers == (3,)
    assert report.held_out_rows < len(validation) / 2
    mean = (calibration.chosen_NLD - calibration.rejected_NLD)[:, 2].mean(axis=0)
    np.testing.assert_allclose(head.direction, mean / np.linalg.norm(mean), atol=1e-6)


def test_a_margin_that_is_length_in_disguise_shows_in_the_report():
    states = pair_states(n=300)
    margins = (states.chosen_NLD - states.rejected_NLD)[:, 1, 0].astype(np.float64)
    _, disguised = fit_legend(replace(states, length_difference_N=margins), layer=2)
    _, honest = fit_legend(states, layer=2)
    assert disguised.spearman_length > 0.9
    assert abs(honest.spearman_length) < 0.2
    assert disguised.length_matched < honest.length_matched


def test_unknown_lengths_are_reported_as_unknown():
    _, report = fit_legend(replace(pair_states(), length_difference_N=None))
    assert (report.spearman_length, report.length_matched, report.length_matched_within) == (None, None, None)


def test_the_manifest_records_what_is_needed_to_fit_again_and_loads(tmp_path):
    made = pair_states()
    states = replace(made, origin=replace(made.origin, final_norm=True, position="eos"))
    head, report = fit_legend(states, name="mine", seed=4)
    manifest = head.manifest
    assert (manifest.name, manifest.version, manifest.position, manifest.final_norm) == ("mine", 1, "eos", True)
    assert (manifest.fit["data"], manifest.fit["seed"], manifest.fit["metrics"]["held_out"]) == (
        "sha256:made",
        4,
        report.held_out,
    )
    assert set(manifest.fit["versions"]) == {"inward", "numpy", "torch"}
    loaded = store.load(
        store.save(head, tmp_path / "mine"), fingerprint=BACKBONE.fingerprint, template=manifest.template
    )
    assert loaded.manifest.fit == json.loads(json.dumps(manifest.fit))


def test_only_the_last_layer_is_marked_as_read_after_the_final_norm():
    assert fit_legend(replace(pair_states(), origin=Origin(final_norm=True)), layer=2)[0].manifest.final_norm is False


def test_a_head_of_states_without_a_backbone_is_never_served(tmp_path):
    head, _ = fit_legend(replace(pair_states(), origin=Origin()))
    folder = store.save(head, tmp_path / "orphan")
    store.load(folder)
    with pytest.raises(store.HeadError, match="unknown"):
        store.load(folder, fingerprint=BACKBONE.fingerprint)


def test_the_report_prints_every_figure():
    _, report = fit_legend(pair_states(), layer="sweep", warnings=["mind the gap"])
    console = Console(width=120)
    with console.capture() as capture:
        console.print(report)
    text = capture.get()
    for part in (
        f"{report.held_out:.3f}",
        f"{report.spearman_length:+.3f}",
        f"{report.stability:.3f}",
        "chosen",
        "warning: mind the gap",
    ):
        assert part in text


def test_constant_refusals_are_warned_about():
    rows = [CalibrationRow(f"p{i}", "h", "I can’t answer that.") for i in range(3)]
    assert "same sentence" in constant_refusal(rows)[0]
    assert "same sentence" in constant_refusal([row.pair for row in rows])[0]
    assert constant_refusal([*rows, CalibrationRow("p", "h", "No.")]) == []
    assert constant_refusal([Pair("p", "a", "b")]) == []


def test_states_that_give_no_direction_are_refused():
    states = pair_states()
    with pytest.raises(DataError, match="do not differ"):
        fit_legend(replace(states, rejected_NLD=states.chosen_NLD))
    with pytest.raises(DataError, match="different prompts"):
        fit_legend(replace(states, groups_N=np.zeros(len(states), dtype=np.int64)))
    with pytest.raises(DataError, match="layer 9"):
        fit_legend(states, layer=9)
    with pytest.raises(DataError, match="position"):
        fit_legend(states, validation=replace(states, origin=Origin("eos")))
