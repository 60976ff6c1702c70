import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics

from inward.errors import DataError
from inward.offline.evaluate import statistics
from inward.offline.evaluate.statistics import bootstrap

RNG = np.random.default_rng(0)
LABELS = RNG.random(60) < 0.4
TIED = np.round(LABELS + RNG.normal(size=60), 1)


def value(statistic, n=60):
    return float(statistic(np.ones((1, n)))[0])


def test_auc_is_scikit_learns_also_with_ties_and_weights():
    weights = RNG.integers(0, 4, size=(5, 60)).astype(float)
    expected = [metrics.roc_auc_score(LABELS, TIED, sample_weight=w) for w in weights]
    np.testing.assert_allclose(statistics.auc(TIED, LABELS)(weights), expected, atol=1e-12)
    assert value(statistics.auc(np.zeros(60), LABELS)) == 0.5


def test_macro_f1_is_scikit_learns():
    said = TIED > 0.5
    assert value(statistics.macro_f1(said, LABELS)) == pytest.approx(metrics.f1_score(LABELS, said, average="macro"))


def test_macro_f1_of_one_answer_for_all_counts_the_other_class_as_zero():
    said = np.ones(60, dtype=bool)
    expected = metrics.f1_score(LABELS, said, average="macro", zero_division=0)
    assert value(statistics.macro_f1(said, LABELS)) == pytest.approx(expected)


def test_spearman_is_scipys_also_with_ties_and_with_weights_that_repeat_rows():
    y = np.round(RNG.normal(size=60), 1)
    assert value(statistics.spearman(TIED, y)) == pytest.approx(stats.spearmanr(TIED, y).statistic)
    times = RNG.integers(0, 3, size=60)
    repeated = stats.spearmanr(np.repeat(TIED, times), np.repeat(y, times)).statistic
    assert float(statistics.spearman(TIED, y)(times[None].astype(float))[0]) == pytest.approx(repeated)


def test_spearman_with_a_constant_is_undefined_instead_of_zero():
    assert np.isnan(value(statistics.spearman(np.ones(60), TIED)))
    assert bootstrap(statistics.spearman(np.ones(60), TIED), np.arange(60)) is None


def test_calibration_error_by_hand():
    stated, true = np.array([0.9, 0.9, 0.9, 0.9, 0.1, 0.1]), np.array([1, 1, 1, 0, 0, 0])
    assert value(statistics.calibration_error(stated, true), 6) == pytest.approx((4 * 0.15 + 2 * 0.1) / 6)


def test_calibration_error_takes_the_ends_of_the_scale():
    assert value(statistics.calibration_error([0.0, 1.0], [0, 1]), 2) == 0.0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=30))
def test_auc_of_the_reversed_scores_is_the_complement(rows):
    scores, labels = np.array([r[0] for r in rows]), np.array([r[1] for r in rows])
    forward, backward = (value(statistics.auc(s, labels), len(rows)) for s in (scores, -scores))
    assert np.isnan(forward) if labels.all() or not labels.any() else forward + backward == pytest.approx(1.0)


def test_interval_holds_the_truth_about_as_often_as_it_says():
    covered = 0
    for seed in range(120):
        draws = np.random.default_rng(seed).random(150) < 0.7
        estimate = bootstrap(statistics.mean(draws), np.arange(150), resamples=300, seed=seed)
        covered += estimate.low <= 0.7 <= estimate.high
    assert 106 <= covered <= 120  # 95 % of 120 is 114; 106 has a chance below 1 in 500


def test_interval_is_wider_where_rows_of_a_prompt_say_the_same():
    draws = np.repeat(np.random.default_rng(0).random(40) < 0.7, 10)
    by_prompt = bootstrap(statistics.mean(draws), np.repeat(np.arange(40), 10))
    by_row = bootstrap(statistics.mean(draws), np.arange(400))
    assert by_prompt.value == by_row.value
    assert by_prompt.high - by_prompt.low > 2 * (by_row.high - by_row.low)


def test_same_seed_same_interval_whatever_fits_into_memory(monkeypatch):
    whole = bootstrap(statistics.mean(TIED), np.arange(60), resamples=100, seed=3)
    assert whole == bootstrap(statistics.mean(TIED), np.arange(60), resamples=100, seed=3)
    assert whole != bootstrap(statistics.mean(TIED), np.arange(60), resamples=100, seed=4)
    monkeypatch.setattr(statistics, "_CELLS", 600)
    parts = bootstrap(statistics.mean(TIED), np.arange(60), resamples=100, seed=3)
    assert (parts.low, parts.high) == pytest.approx((whole.low, whole.high))


def test_one_prompt_is_refused():
    with pytest.raises(DataError, match="two different prompts; these are of 1"):
        bootstrap(statistics.mean([0.0, 1.0]), [7, 7])
