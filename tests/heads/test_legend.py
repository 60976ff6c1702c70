import math

import numpy as np
import pytest

from inward.errors import HeadError, InternalError
from inward.heads.legend import LegendHead
from inward.types import LayerScores, PairScores, Reading
from support.small_heads import legend, manifest


def reading(*values, tokens=None):
    return Reading(np.array(values, dtype=np.float32)[:, None], tokens)


def test_the_readout_is_the_direction_at_the_manifests_place():
    head = legend(layers=(3,), position="eos", final_norm=True)
    (tap,) = head.readout.taps
    assert (tap.layer, tap.position, tap.final_norm, tap.weight_DK.shape) == (3, "eos", True, (4, 1))
    assert np.array_equal(tap.weight_DK[:, 0], head.direction)


def test_a_pair_whose_chosen_answer_is_on_the_safe_side_has_a_positive_margin():
    pair = legend().score(reading(2.5, -2.0), pair=True).pair
    assert pair == PairScores(4.5, 2.25, 1.0, label_agrees=True)


def test_a_pair_that_contradicts_its_label_is_in_the_lowest_bin_and_says_so():
    pair = legend().score(reading(-2.0, 2.5), pair=True).pair
    assert pair == PairScores(-4.5, -2.25, 0.0, label_agrees=False)


@pytest.mark.parametrize(
    ("margin", "value"), [(0, 0.0), (0.5, 0.0), (1.0, 0.25), (1.9, 0.25), (2.0, 0.5), (3.0, 1.0), (99, 1.0)]
)
def test_bins_are_closed_below(margin, value):
    assert legend().score(reading(margin, 0), pair=True).pair.bin == value


def test_equal_scores_neither_agree_nor_disagree_with_a_label():
    assert legend().score(reading(1.0, 1.0), pair=True).pair == PairScores(0.0, 0.0, 0.0, label_agrees=None)


def test_a_direction_that_is_calibrated_on_pairs_gives_the_probability_of_a_label():
    one = legend(calibration={"platt_pair": {"slope": 2.0, "intercept": 0.5}})
    assert one.score(reading(1.5, 1.0), pair=True).pair.label_probability == pytest.approx(1 / (1 + math.exp(-1.5)))
    assert one.score(reading(1.0, 1.0), pair=True).pair.label_probability == 0.5  # whatever the intercept
    assert legend().score(reading(1.5, 1.0), pair=True).pair.label_probability is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_is_none_for_that_response_only(bad):
    scores = legend().score(reading(1.0, bad), pair=True, details=frozenset({"layers"}))
    assert scores.scores_N == (1.0, None)
    assert scores.layers_N == (LayerScores((2,), (1.0,)), LayerScores((2,), (None,)))
    assert scores.pair == PairScores()


def test_without_calibration_a_margin_is_raw_only():
    pair = legend(calibration={}).score(reading(1.0, 0.0), pair=True).pair
    assert pair == PairScores(1.0, label_agrees=True)


def test_token_scores_are_the_readout_at_every_response_token():
    tokens = (np.array([[0.5], [1.0]], np.float32), np.zeros((0, 1), np.float32))
    scores = legend().score(reading(1.0, 2.0, tokens=tokens), details=frozenset({"tokens"}))
    assert scores.tokens_N == ((0.5, 1.0), ())
    with pytest.raises(InternalError):
        legend().score(reading(1.0), details=frozenset({"tokens"}))


def test_what_was_not_asked_for_is_not_there():
    scores = legend().score(reading(1.0, 2.0))
    assert (scores.layers_N, scores.tokens_N, scores.pair, scores.listwise) == (None, None, None, False)


def test_a_direction_that_is_not_of_unit_length_or_of_several_layers_is_refused():
    with pytest.raises(HeadError, match="length 2"):
        LegendHead(manifest(), np.array([2, 0, 0, 0], np.float32))
    with pytest.raises(HeadError, match="one layer"):
        legend(layers=(1, 2))
