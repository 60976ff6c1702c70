import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from inward.errors import DataError, HeadError, InvalidField
from inward.heads.calibration import BIN_VALUES, Acceptable, Deciles, MarginScale, PairCalibration, Platt, sigmoid
from inward.types import PairScores


def test_bins_hold_equal_shares_of_the_agreeing_calibration_margins():
    margins = np.random.default_rng(0).exponential(size=4000)
    scale = MarginScale.fit(margins)
    values = np.array([scale.bin(m) for m in margins])
    assert [round(float((values == v).mean()), 2) for v in BIN_VALUES] == [0.25] * 4


def test_margins_below_zero_do_not_move_the_edges_but_count_for_the_scale():
    positive = np.linspace(0.1, 4, 40)
    both = np.concatenate([positive, -positive])
    assert MarginScale.fit(both).edges == MarginScale.fit(positive).edges
    assert MarginScale.fit(both).std == pytest.approx(both.std())


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_a_larger_margin_never_gets_a_smaller_bin(a, b):
    scale = MarginScale(1.0, (-3.0, 0.5, 2.0))
    low, high = sorted((a, b))
    assert scale.bin(low) <= scale.bin(high)
    assert scale.bin(-abs(a)) == 0.0


@pytest.mark.parametrize("margins", [[], [1, 2, 3], [-1, -2, -3, -4, -5], [2, 2, 2, 2, 2], [1, 2, 3, 4, math.nan]])
def test_margins_that_give_no_scale_are_refused(margins):
    with pytest.raises(DataError):
        MarginScale.fit(margins)


def test_a_scale_survives_the_manifest():
    scale = MarginScale.fit(np.random.default_rng(0).exponential(size=50))
    assert MarginScale.load(scale.dump()) == scale
    assert MarginScale.load({}) is None


def test_a_pair_without_two_finite_scores_has_nothing_and_one_response_is_no_pair():
    calibrated = PairCalibration(None, Platt(1.0, 0.0))
    assert calibrated.compare((math.inf, 1.0)) == PairScores()
    assert calibrated.compare((None, 1.0)) == PairScores()
    with pytest.raises(InvalidField, match="chosen first; this group has 1"):
        calibrated.compare((1.0,))


def test_platt_finds_the_curve_that_made_the_labels():
    rng = np.random.default_rng(0)
    scores = rng.normal(3, 20, size=20_000)
    labels = rng.random(20_000) < sigmoid(0.2 * scores - 1)
    platt = Platt.fit(scores, labels)
    assert platt.slope == pytest.approx(0.2, rel=0.05)
    assert platt.intercept == pytest.approx(-1, rel=0.05)


def test_platt_agrees_with_logistic_regression_where_smoothing_vanishes():
    rng = np.random.default_rng(1)
    scores = rng.normal(size=5000)
    labels = rng.random(5000) < sigmoid(1.5 * scores + 0.5)
    reference = LogisticRegression(C=1e8, tol=1e-8).fit(scores[:, None], labels)
    platt = Platt.fit(scores, labels)
    assert platt.slope == pytest.approx(reference.coef_.item(), rel=0.01)


@pytest.mark.parametrize("spread", [1e-6, 1.0, 1e6])
def test_platt_of_separable_scores_stays_finite_and_sure(spread):
    platt = Platt.fit(np.array([-2, -1, 1, 2]) * spread, [False, False, True, True])
    low, high = platt(np.array([-2, 2]) * spread)
    assert 0 < low < 0.3
    assert 0.7 < high < 1


def test_platt_survives_the_manifest_and_refuses_nonsense():
    platt = Platt(1.5, -0.5)
    assert Platt.load({"platt": platt.dump()}) == platt
    assert Platt.load({}) is None
    for bad in ({"slope": 1}, {"slope": math.nan, "intercept": 0}, 3, {"slope": "x", "intercept": 0}):
        with pytest.raises(HeadError, match=r"calibration\.platt"):
            Platt.load({"platt": bad})
    with pytest.raises(DataError):
        Platt.fit([1, 2], [True, True])


def test_sigmoid_does_not_overflow():
    assert sigmoid([-1e9, 0, 1e9]).tolist() == [0.0, 0.5, 1.0]


def test_the_calibration_scores_themselves_fall_into_all_tenths_alike():
    scores = np.random.default_rng(0).normal(size=2000)
    deciles = Deciles.fit(scores)
    assert np.bincount([deciles.tenth(s) for s in scores], minlength=11)[1:].tolist() == [200] * 10
    assert (deciles.tenth(-1e9), deciles.tenth(1e9)) == (1, 10)


def test_deciles_survive_the_manifest():
    deciles = Deciles.fit(np.arange(50.0))
    assert Deciles.load(deciles.dump()) == deciles
    assert Deciles.load({}) is None


@pytest.mark.parametrize("edges", [[1, 2], list(range(9, 0, -1)), [*range(8), math.nan], ["a"] * 9, None])
def test_deciles_that_are_none_are_refused(edges):
    with pytest.raises(HeadError, match="score_deciles"):
        Deciles.load({"score_deciles": edges})


@pytest.mark.parametrize("scores", [[], [1.0, math.nan]])
def test_scores_that_give_no_deciles_are_refused(scores):
    with pytest.raises(DataError):
        Deciles.fit(scores)


def test_a_threshold_has_the_false_positives_that_were_asked_for():
    scores = np.random.default_rng(0).normal(size=5000)
    acceptable = Acceptable.load(Acceptable.fit(scores).dump())
    assert acceptable is not None and not acceptable.estimated
    for rate in (0.001, 0.01, 0.05, 0.5):
        assert (scores < acceptable.threshold(rate)).mean() == pytest.approx(rate, rel=0.1)
    assert acceptable.threshold(0.01) < acceptable.threshold(0.015) < acceptable.threshold(0.02)


def test_a_rate_that_the_calibration_set_is_too_small_for_is_refused():
    acceptable = Acceptable.fit(np.arange(100.0))
    assert min(acceptable.rates) == 0.01
    for rate in (0.009, 0.6):
        with pytest.raises(InvalidField, match=r"tells 0\.01 to 0\.5"):
            acceptable.threshold(rate)


def test_a_head_that_kept_only_tenths_has_its_threshold_estimated():
    """From two classes with known scores: what is estimated is near what would have been kept."""
    rng = np.random.default_rng(0)
    good, bad = rng.normal(1, 1, size=20_000), rng.normal(-1, 1, size=20_000)
    both, labels = np.concatenate([good, bad]), np.arange(40_000) < 20_000
    calibration = Deciles.fit(both).dump() | {"platt": Platt.fit(both, labels).dump()}
    estimated, known = Acceptable.load(calibration), Acceptable.fit(good)
    assert estimated is not None and estimated.estimated
    for rate in (0.01, 0.05, 0.2, 0.5):
        seen = (good < estimated.threshold(rate)).mean()
        assert rate / 2 < seen < 2 * rate, (rate, seen, known.threshold(rate))
    assert Acceptable.load({**calibration, "platt": None}) is None
    assert Acceptable.load({}) is None


@pytest.mark.parametrize(
    "entry",
    [None, {}, {"rates": [], "scores": []}, {"rates": [0.1, 0.01], "scores": [1, 2]}, {"rates": [0.1], "scores": ["x"]},
     {"rates": [0.1, 0.2], "scores": [2, 1]}, {"rates": [0.1], "scores": [math.nan]}],
)  # fmt: skip
def test_thresholds_that_are_none_are_refused(entry):
    with pytest.raises(HeadError, match=r"calibration\.acceptable"):
        Acceptable.load({"acceptable": entry})


def test_a_quantile_grows_with_the_score_and_is_the_share_below_it():
    scores = np.random.default_rng(0).normal(size=10_000)
    deciles = Deciles.fit(scores)
    quantiles = [deciles.quantile(x) for x in (-5, -1.5, -0.5, 0, 0.5, 1.5, 5)]
    assert quantiles == sorted(quantiles) and 0 < quantiles[0] < quantiles[-1] < 1
    assert deciles.quantile(0) == pytest.approx(0.5, abs=0.02)
