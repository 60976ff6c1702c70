from dataclasses import replace

import numpy as np
import pytest

from inward.errors import DataError
from inward.offline.evaluate.examples import of_lists, of_pairs
from inward.offline.evaluate.metrics import NAMES, length_matched, measure
from inward.offline.evaluate.scoring import Judged
from support import made_examples as made


def small(safe, list_of, **more):
    states = np.zeros((len(safe), 1, 2), dtype=np.float32)
    return of_lists(states, safe, list_of, np.arange(max(list_of) + 1), layers=(1,), **more)


def test_a_reward_that_knows_gets_everything_right():
    found = measure(made.lists(), made.truth(made.lists()))
    assert {found[name].value for name in ("pair_accuracy", "auc", "macro_f1", "top1_safe_rate")} == {1.0}


def test_a_constant_reward_is_chance_and_never_agrees():
    examples = made.pairs()
    found = measure(examples, Judged(np.zeros(len(examples))))
    assert found["pair_accuracy"].value == found["auc"].value == 0.5
    assert found["label_agreement"].value == 0.0
    assert found["spearman_length"] is None


def test_every_name_is_there_whatever_the_input():
    examples = made.pairs(lengths=False)
    found = measure(examples, made.truth(examples))
    assert list(found) == list(NAMES)
    assert found["top1_safe_rate"] is None
    assert found["spearman_length"] is None
    assert found["calibration_error"] is None


def test_every_safe_response_of_a_list_is_compared_with_every_unsafe_one():
    examples = small([True, False, False, True, False, True, True], [0, 0, 0, 0, 1, 1, 2])
    assert examples.pairs_P2.tolist() == [[0, 1], [0, 2], [3, 1], [3, 2], [5, 4]]


def test_top_pick_counts_only_in_lists_that_have_both_kinds():
    examples = small([True, False, True, False, True, True], [0, 0, 1, 1, 2, 2])
    found = measure(examples, Judged(np.array([1.0, 0.0, 0.0, 1.0, 5.0, 5.0])))
    assert found["top1_safe_rate"].value == 0.5


def test_tied_top_picks_share_the_first_place():
    examples = small([True, False, False, True, False], [0, 0, 0, 1, 1])
    found = measure(examples, Judged(np.array([1.0, 1.0, 0.0, 2.0, 1.0])))
    assert found["top1_safe_rate"].value == pytest.approx(0.75)


def test_pairs_have_no_top_pick():
    assert made.pairs().mixed == ()


def test_without_a_probability_as_many_count_as_safe_as_are():
    examples = small([True, False, False, False], [0, 0, 1, 1])
    found = measure(examples, Judged(np.array([3.0, 2.0, 1.0, 0.0])))
    assert found["macro_f1"].value == 1.0


def test_with_a_probability_the_cut_is_one_half():
    examples = small([True, False, True, False], [0, 0, 1, 1])
    sure = Judged(np.array([2.0, 1.0, 2.0, 1.0]), np.array([0.9, 0.8, 0.9, 0.8]))
    assert measure(examples, sure)["macro_f1"].value == pytest.approx((2 / 3 + 0) / 2)
    assert measure(examples, sure)["calibration_error"].value == pytest.approx((0.1 + 0.8) / 2)


def test_length_matched_takes_the_quarter_with_the_smallest_difference_either_way():
    assert length_matched(np.array([-9.0, 1.0, -1.0, 5.0, 7.0, 30.0, -40.0, 50.0])).tolist() == [1, 2]


def test_a_reward_that_pays_for_length_is_found_out():
    examples = made.pairs(n=200)
    paid = Judged(None, margin_P=examples.length_difference_P)
    found = measure(examples, paid)
    assert found["spearman_length"].value == pytest.approx(1.0)
    assert found["auc"] is None


def test_over_refusal_is_the_share_of_refusals_that_win():
    examples = replace(made.lists(), refusals_P2=np.array([[0, 1], [5, 6], [10, 11], [15, 16]]))
    scores = np.zeros(len(examples))
    scores[[0, 5, 10]] = 1.0
    scores[16] = 1.0
    assert measure(examples, Judged(scores))["over_refusal"].value == 0.75


@pytest.mark.parametrize(("safe", "said"), [([True] * 4, "labelled safe"), ([False] * 4, "labelled unsafe")])
def test_one_class_is_refused(safe, said):
    with pytest.raises(DataError, match=said):
        small(safe, [0, 0, 1, 1])


def test_one_prompt_is_refused():
    states = np.zeros((3, 1, 2), dtype=np.float32)
    with pytest.raises(DataError, match="at least two different prompts"):
        of_pairs(states, states, layers=(1,), groups=[4, 4, 4])
