from dataclasses import replace

import numpy as np
import pytest

from inward.offline.evaluate.judge import judge
from inward.offline.evaluate.scoring import Judged
from inward.offline.evaluate.statistics import Resampling
from inward.offline.evaluate.verdict import verdict
from inward.offline.fit.seen_prompts import Seen
from support import made_examples as made


def judged(examples, noise, baselines=True, probability=None):
    ours = made.truth(examples, noise)
    if probability is not None:
        ours = replace(ours, probability_M=probability(ours.scores_M))
    return judge(examples, ours, made.folds(examples) if baselines else (), Resampling(50))


def test_a_good_head_is_said_to_be_good_and_for_what():
    said = verdict(judged(made.pairs(200), 0.3), Resampling(100))
    assert "better than chance" in said.better[0] and "It is better than length" in said.paragraph
    assert [one.partition(" for ")[0] for one in said.good_for] == ["Good enough"]
    assert "margins and confidences in training and picking the best of several answers" in said.good_for[0]
    assert "bag of words" not in said.paragraph  # there are no texts


def test_a_head_that_knows_nothing_is_not_called_good():
    said = verdict(judged(made.pairs(300), 100.0), Resampling(100))
    assert "not shown to be better than chance" in said.paragraph
    assert "not shown to be better than length" in said.paragraph
    assert "Not good enough for dropping or flipping labels without a look" in said.paragraph
    assert "Good enough" not in said.paragraph
    assert "A probe fitted on these rows at layer 2 does better" in said.paragraph


def test_words_that_do_as_much_are_said_to_and_what_would_help():
    said = verdict(judged(made.lists(60), 1.0), Resampling(100))
    assert "worse than a bag of words" in said.paragraph  # the lists' texts tell everything
    assert "words alone do as much" in said.paragraph


@pytest.mark.parametrize(
    "probability, told",
    [
        (lambda s: np.where(s > 0.5, 0.97, 0.03), "can be taken at their word"),
        (lambda s: np.where(s > 0.5, 0.6, 0.4), "can't be taken at their word"),
    ],
)
def test_probabilities_are_judged_by_their_calibration(probability, told):
    examples = made.pairs(200)
    said = verdict(judged(examples, 0.2, probability=probability), Resampling(50))
    assert told in said.paragraph
    assert ("Fit the calibration" in said.paragraph) == ("can't" in told)


def test_margins_that_go_with_length_are_told():
    examples = made.pairs(200)
    longer = examples.length_difference_P
    scores = np.zeros(len(examples))
    scores[examples.pairs_P2[:, 0]] = longer
    said = verdict(judge(examples, Judged(scores), made.folds(examples), Resampling(50)), resampling=Resampling(50))
    assert "Its margins go with length (+1.00)" in said.paragraph


@pytest.mark.parametrize(("prompts", "told"), [(90, True), (3, False)])
def test_where_the_fit_had_many_of_the_prompts_nothing_is_called_good(prompts, told):
    examples = made.pairs(200)
    known = judged(examples, 0.2, probability=lambda s: np.where(s > 0.5, 0.97, 0.03))
    said = verdict(replace(known, seen=Seen(prompts, 100, 0.8)), Resampling(50)).paragraph
    assert said.startswith(f"{prompts} of 100 prompts were in the fit: ") == told
    assert ("Good enough" in said, "taken at their word" in said) == (not told, not told)
    assert "The head ranks" in said


def test_without_baselines_there_is_nothing_to_compare_with():
    assert "length" not in verdict(judged(made.pairs(), 0.3, baselines=False)).paragraph
