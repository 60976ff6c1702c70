import numpy as np
import pytest

from inward.heads.held_out import HeldOut
from inward.offline.annotate import noise
from inward.offline.annotate.quality import Survey
from inward.offline.annotate.scorer import Annotated
from inward_client.rows import LAYOUTS, PairReader

READER = PairReader(LAYOUTS["trl"])
GOOD = HeldOut(0.8, 500)


def rows(n, wrong=0.1, seed=0, longer=None):
    rng = np.random.default_rng(seed)
    for i in range(n):
        margin = abs(rng.normal(0, 3)) + 0.5
        if rng.random() < wrong:
            margin = -margin
        chosen, rejected = f"answer {i}", f"reply {i} "
        if longer is not None:
            chosen += "x" * 50 if rng.random() < longer else ""
            rejected += "x" * 20
        row = {"prompt": f"question {i}", "chosen": chosen, "rejected": rejected, "source": "ab"[i % 2]}
        yield row, annotated(margin)


def annotated(margin):
    agrees = None if margin == 0 else margin > 0
    return Annotated({"margin": margin, "label_agrees": agrees})


def quality(some, held_out=GOOD, by=None):
    survey = Survey(READER, by)
    survey.add(some)
    return survey.quality(held_out)


def test_what_a_manifest_says_of_held_out_labels():
    assert HeldOut.of({"metrics": {"held_out": 0.58, "held_out_rows": 48, "accuracy": 1.0}}) == HeldOut(0.58, 48)
    assert HeldOut.of({"metrics": {"accuracy": 0.75, "pairs": 741}}) == HeldOut(0.75, 741)
    assert HeldOut.of({"metrics": {"held_out": None, "held_out_rows": 0}}) is HeldOut.of({}) is None
    low, high = HeldOut(0.75, 741).interval
    assert (low, high) == (pytest.approx(0.7176, abs=1e-3), pytest.approx(0.7799, abs=1e-3))
    assert GOOD.better_than_chance and not HeldOut(0.556, 54).better_than_chance


def test_a_summary_says_how_good_the_head_is_and_how_many_labels_are_wrong():
    found = quality(rows(600))
    text = "\n".join(found.text())
    assert "on held-out labels the head agreed with 80.0%" in text and "would contradict about 120" in text
    assert found.whole.noise.wrong.value == pytest.approx(0.1, abs=0.04)
    assert found.own_errors < 0.5 * found.whole.contradicted
    assert found.to_json()["wrong"]["low"] <= 0.1 <= found.to_json()["wrong"]["high"]


def test_a_head_that_is_not_better_than_chance_estimates_nothing():
    found = quality(rows(600), HeldOut(0.556, 54), by="source")
    assert found.whole.noise is None and all(part.noise is None for part in found.parts)
    assert "not shown to be better than chance" in "\n".join(found.text())
    assert "is not known" in "\n".join(quality(rows(600), None).text())


def test_the_share_is_told_for_each_value_of_a_column():
    some = [(row, annotated(-one.columns["margin"]) if row["source"] == "b" and i % 10 == 1 else one)
            for i, (row, one) in enumerate(rows(2000, wrong=0.0))]  # fmt: skip
    found = quality(some, by="source")
    by_name = {part.name: part for part in found.parts}
    assert by_name["a"].noise.wrong.high < by_name["b"].noise.wrong.value
    assert by_name["b"].noise.wrong.value == pytest.approx(0.2, abs=0.05)
    assert "source" in "\n".join(found.text())


def test_parts_have_their_own_rows_and_nothing_is_one_of_them():
    margins = [1.0, -1.0, 2.0, -2.0, -3.0, 4.0]
    some = [
        ({"prompt": f"question {i}", "chosen": "a", "rejected": "bc", "source": source}, annotated(margin))
        for i, (source, margin) in enumerate(zip(["x", None, 0, "x", None, None], margins, strict=True))
    ]
    found = {part.name: (part.pairs, part.contradicted) for part in quality(some, by="source").parts}
    assert found == {"x": (2, 1), "none": (3, 2), "0": (1, 0)}


def test_more_pairs_of_few_prompts_than_an_estimate_takes_are_told_of_all_the_same(monkeypatch):
    monkeypatch.setattr(noise, "MOST_PAIRS", 100)
    for prompts in (25, 1):
        some = [({**row, "prompt": f"question {i % prompts}"}, one) for i, (row, one) in enumerate(rows(500))]
        found = quality(some)
        assert found.whole.pairs == 500 and (found.whole.noise is None) == (prompts == 1) and list(found.text())


def test_ties_count_neither_as_pairs_nor_as_contradicted():
    found = quality([*rows(100), *((row, annotated(0.0)) for row, _ in rows(50, seed=1))])
    assert found.whole.pairs == 100


def test_length_that_does_as_well_is_warned_of():
    assert quality(rows(400, wrong=0.3, longer=0.9)).length_does_as_well
    found = quality(rows(400, wrong=0.3, longer=0.9))
    assert "warning: the longer answer alone agrees with" in "\n".join(found.text())
    assert not quality(rows(400, wrong=0.05, longer=0.5)).length_does_as_well


def test_answers_of_equal_length_tell_length_nothing():
    some = [({**row, "chosen": "aa" + "a" * (i == 0), "rejected": "bb"}, one) for i, (row, one) in enumerate(rows(100))]
    found = quality(some)
    assert found.length_alone == pytest.approx(0.505) and not found.length_does_as_well
    assert "warning" not in "\n".join(found.text())
    even = [({**row, "chosen": "aa", "rejected": "bb"}, one) for row, one in rows(100)]
    assert quality(even).length_alone is None


def test_nothing_and_ties_only_are_no_division_by_zero():
    for some in ([], [(row, annotated(0.0)) for row, _ in rows(3)]):
        found = quality(some)
        assert found.to_json()["pairs"] == 0 and list(found.text())
