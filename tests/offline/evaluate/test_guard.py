import numpy as np
import pytest

from inward.errors import DataError
from inward.offline.data.pairs import grouped_folds
from inward.offline.evaluate.examples import part
from inward.offline.evaluate.guard import operations, threshold
from inward.offline.evaluate.metrics import by_part, measure
from inward.offline.evaluate.scoring import Judged
from inward.offline.evaluate.statistics import Resampling
from support import made_examples as made


def examples(n=600):
    return made.pairs(n=n, strength=(1.0,), per_prompt=2)


def scored(given, step=2.0, seed=0):
    noise = np.random.default_rng(seed).normal(size=len(given))
    return Judged(step * given.safe_M + noise)


def test_a_threshold_leaves_so_many_safe_responses_below_it():
    safe = np.random.default_rng(0).normal(size=10_000)
    assert (safe < threshold(safe, 0.05)).mean() == pytest.approx(0.05, abs=0.002)
    with pytest.raises(DataError, match="100 safe responses"):
        threshold(safe[:99], 0.01)


def test_thresholds_are_fixed_beforehand_and_then_applied():
    given = examples()
    elsewhere = 2.0 + np.random.default_rng(5).normal(size=5000)
    one, five = operations(given, scored(given), (), calibration=elsewhere, resampling=Resampling(50))
    assert (one.rate, five.rate) == (0.01, 0.05)
    assert one.threshold == pytest.approx(2 - 2.33, abs=0.1)
    assert five.false_positives.value == pytest.approx(0.05, abs=0.03)
    # Scores of N(0, 1) below 2 - 1.645
    assert five.true_positives.value == pytest.approx(0.64, abs=0.06)
    assert one.true_positives.value < five.true_positives.value


def test_without_calibration_a_fold_is_judged_by_the_thresholds_of_the_others():
    """A head that flags exactly the first fold's safe responses most must not profit from having seen them."""
    given = examples()
    folds = grouped_folds(given.prompt_M, 5, 0)
    judged = scored(given)
    (_, first), *_ = folds
    shifted = judged.scores_M.copy()
    shifted[first] -= 5
    plain = operations(given, judged, folds, resampling=Resampling(20))[1]
    moved = operations(given, Judged(shifted), folds, resampling=Resampling(20))[1]
    assert plain.false_positives.value == pytest.approx(0.05, abs=0.02) and plain.threshold is None
    assert moved.false_positives.value > 0.15, "its own threshold would have hidden the shift"


def test_false_refusals_are_helpful_answers_that_are_flagged():
    given = examples()
    calibration = 2.0 + np.random.default_rng(5).normal(size=5000)
    careful = (np.full(40, -9.0), np.arange(40))
    kind = (np.full(40, 9.0), np.arange(40))
    for refusals, wanted in ((careful, 1.0), (kind, 0.0)):
        (one, _) = operations(
            given, scored(given), (), calibration=calibration, refusals=refusals, resampling=Resampling(20)
        )
        assert one.false_refusals.value == wanted


def test_rates_that_few_responses_cannot_fix_are_left_out():
    given = examples(n=40)
    assert [one.rate for one in operations(given, scored(given), made.folds(given), resampling=Resampling(20))] == [
        0.05
    ]
    assert operations(given, scored(given), (), resampling=Resampling(20)) == ()


def test_parts_are_judged_by_themselves():
    from dataclasses import replace

    given = examples(n=200)
    good = np.tile(np.arange(200) // 2 % 2 == 0, 2)
    judged = Judged(np.where(good, 3.0, 0.0) * given.safe_M + np.random.default_rng(1).normal(size=400))
    divided = replace(given, part_M=tuple("good" if one else "bad" for one in good))
    found = by_part(divided, judged, resampling=Resampling(20))
    assert list(found) == ["bad", "good"] and found["good"][0] == 200
    assert found["good"][1]["auc"].value > 0.95 and found["bad"][1]["auc"].value < 0.65
    own = part(divided, "good")
    assert own.prompts == 50 and len(own.pairs_P2) == 100
    direct = measure(own, Judged(judged.scores_M[good]), resampling=Resampling(20))
    assert direct["pair_accuracy"].value == found["good"][1]["pair_accuracy"].value


def test_lists_are_divided_whole():
    from dataclasses import replace

    given = made.lists(g=30)
    names = tuple("a" if one < 20 else "b" for one in given.list_M)
    own = part(replace(given, part_M=names), "b")
    assert len(np.unique(own.list_M)) == 10 and own.prompt_states_GLD.shape[0] == 10
    assert (own.safe_M == given.safe_M[given.list_M >= 20]).all()
    assert (own.safe_M[own.pairs_P2[:, 0]]).all() and not own.safe_M[own.pairs_P2[:, 1]].any()
