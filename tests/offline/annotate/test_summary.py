import itertools
import json

import numpy as np
import pytest

from inward.offline.annotate.scorer import Annotated
from inward.offline.annotate.summary import Wanted, binned, histogram, pick, shown, summarise
from inward_client.rows import LAYOUTS, PairReader, find

READER = PairReader(LAYOUTS["trl"])

MARGINS = [3.0, -1.0, None, 0.5, -4.0, 2.0]


def result(margin):
    if margin is None:
        return Annotated(None, "612 tokens, but the model takes 512")
    values = {
        "margin": margin,
        "margin_scaled": margin,
        "margin_bin": 0.0,
        "confidence": 0.75,
        "chosen_score": margin,
        "rejected_score": 0.0,
    }
    return Annotated({**values, "label_agrees": margin > 0}, truncated=margin == 2.0)


RESULTS = [result(margin) for margin in MARGINS]


@pytest.fixture
def source(tmp_path):
    rows = [{"prompt": f"<b>question {n}</b>", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(6)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return find(tmp_path / "in.jsonl")[0]


def test_a_summary_counts_flips_cuts_and_reasons():
    summary = summarise([*RESULTS, Annotated(None, "700 tokens, but the model takes 512")])
    assert (summary.rows, summary.annotated, summary.rejected, summary.flipped, summary.truncated) == (7, 5, 2, 2, 1)
    assert summary.reasons == (("612 tokens, but the model takes 512", 2),)
    assert summary.to_json()["label_agreement"] == pytest.approx(0.6)
    assert summary.to_json()["margin"]["mean"] == pytest.approx(0.1)
    assert "2 labels are contradicted by the head (40.0%)" in summary.text()


def test_reasons_that_differ_by_a_name_are_not_one():
    reasons = ["'response_0' is missing", "'response_1' is missing", "'x' must be 0 or 1", "'x' must be 0 or 1"]
    summary = summarise([Annotated(None, reason) for reason in reasons])
    assert set(summary.reasons) == {(reasons[0], 1), (reasons[1], 1), (reasons[2], 2)}


def test_ties_are_neither_flipped_nor_suspicious(source):
    tie = result(0.0)
    tie.columns["label_agrees"] = None
    summary = summarise([*RESULTS, tie])
    assert (summary.annotated, summary.flipped, summary.ties) == (6, 2, 1)
    assert summary.to_json()["label_agreement"] == pytest.approx(0.6)
    assert "1 pairs are ties" in summary.text()
    assert pick([source], lambda _: [tie] * 6, READER, 3) == []


def test_a_summary_of_nothing_is_no_division_by_zero():
    assert summarise([result(None)]).to_json()["label_agreement"] is None
    assert "0 of 1 pairs annotated" in summarise([result(None)]).text()


@pytest.mark.parametrize("values", [[-3.0, 1.0, 2.0], [1.0], [0.0, 0.0], [-5.0, -4.0], [1e-9, 1e9]])
def test_bars_count_everything_and_never_mix_the_signs(values):
    counts, edges = binned(np.array(values, dtype=np.float32), 15)
    assert counts.sum() == len(values)
    assert not any(left < 0 < right for left, right in itertools.pairwise(edges))
    assert len(list(histogram(np.array(values, dtype=np.float32)))) == 15


def test_pairs_that_contradict_their_labels_come_first_with_their_texts_and_no_others_are_suspicious(source):
    found = pick([source], lambda _: RESULTS, READER, 3)
    assert [one.columns["margin"] for one in found] == [-4.0, -1.0]
    assert [one.row for one in found] == [5, 2]
    assert found[0].pair.chosen == "good 4"
    assert "good 4" in shown(found[0]) and "row 5" in shown(found[0])


def test_a_sample_is_of_all_annotated_pairs_and_the_same_each_time(source):
    found = pick([source], lambda _: RESULTS, READER, 10, "sample")
    assert sorted(one.row for one in found) == [1, 2, 4, 5, 6]
    assert pick([source], lambda _: RESULTS, READER, 2, "sample") == found[:2]


def test_only_rows_that_are_asked_for_are_written():
    agreeing, against = result(1.0), result(-1.0)
    against.columns["label_probability"] = 0.2
    assert Wanted(only_flipped=True).or_left_out(agreeing).columns is None
    assert Wanted(only_flipped=True).or_left_out(against) is against
    assert Wanted(least=0.3).or_left_out(against).columns is None
    assert Wanted(least=0.2).or_left_out(against) is against
    assert Wanted(least=0.9).or_left_out(agreeing) is agreeing  # its probability is not known
