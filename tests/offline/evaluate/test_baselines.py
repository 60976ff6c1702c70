from dataclasses import replace

import numpy as np
import pytest

from inward.errors import DataError
from inward.offline.evaluate.baselines import baselines, stable_rank
from inward.offline.evaluate.layerwise import cross_validate, logistic, mean_difference
from inward.offline.evaluate.metrics import measure
from inward.offline.evaluate.statistics import Resampling
from support import made_examples as made


def found(examples, **more):
    return {one.name: one.judged for one in baselines(examples, made.folds(examples), **more)}


@pytest.mark.parametrize("probe", [logistic, mean_difference])
def test_the_layer_that_knows_most_is_chosen_in_every_fold(probe):
    examples = made.pairs(n=120)
    assert cross_validate(examples, made.folds(examples), probe).chosen == (2, 2, 2, 2)


def test_a_layer_that_is_only_good_on_the_held_out_fold_is_not_chosen_for_it():
    examples = made.pairs(n=120, strength=(1.5, 0.0))
    folds = made.folds(examples)
    held_out = folds[0][1]
    states = examples.states_MLD.copy()
    states[held_out, 1, 0] += 50 * examples.safe_M[held_out]
    probes = cross_validate(replace(examples, states_MLD=states), folds, mean_difference)
    assert probes.chosen[0] == 1


def test_noise_stays_at_chance_though_there_are_more_dimensions_than_rows():
    examples = made.pairs(n=60, strength=(0.0, 0.0, 0.0), width=300)
    for judged in (found(examples)["logistic_probe"], found(examples)["mean_difference"]):
        estimate = measure(examples, judged, resampling=Resampling(200))["pair_accuracy"]
        assert estimate.low < 0.5 < estimate.high


def test_the_span_of_the_rows_gives_what_all_dimensions_give():
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(60, 90)).astype(np.float32)
    safe = wide[:, 0] > 0
    padded = np.concatenate([wide, np.zeros((60, 1), dtype=np.float32)], axis=1)
    few, many = logistic(wide[:40], safe[:40], wide[40:]), logistic(padded[:40], safe[:40], padded[40:])
    assert np.corrcoef(few, many)[0, 1] > 0.999


def test_a_fold_without_one_class_gets_no_opinion_instead_of_an_exception():
    examples = made.lists(g=6, size=4)
    only = np.zeros(len(examples), dtype=bool)
    only[np.flatnonzero(examples.list_M == 0)[:2]] = True
    lonely = replace(examples, safe_M=only)
    probes = cross_validate(lonely, made.folds(lonely, k=6), logistic)
    assert not probes.scores_LM[:, lonely.list_M == 0].any()


def test_two_folds_leave_nothing_to_choose_a_layer_by():
    examples = made.pairs()
    with pytest.raises(DataError, match="at least three folds"):
        cross_validate(examples, made.folds(examples, k=2), logistic)


def test_pairs_of_states_get_what_states_allow():
    assert set(found(made.pairs())) == {"length", "mean_difference", "logistic_probe"}
    assert set(found(made.pairs(lengths=False))) == {"mean_difference", "logistic_probe"}


def test_lists_with_texts_get_everything():
    examples = made.lists()
    examples = replace(examples, stable_rank_M=np.arange(len(examples), dtype=float))
    names = {
        "length",
        "mean_difference",
        "logistic_probe",
        "tfidf_logistic",
        "stable_rank",
        "linear_scorer",
        "mlp_scorer",
    }
    assert set(found(examples)) == names


def test_words_that_give_the_label_away_are_found_by_tfidf():
    examples = made.lists()
    assert measure(examples, found(examples)["tfidf_logistic"], resampling=Resampling(50))["auc"].value == 1.0


def test_scorers_of_lists_read_the_layer_they_are_told():
    examples = made.lists(g=60, strength=(0.0, 4.0))
    blind, seeing = (
        measure(examples, found(examples, layer=k)["mlp_scorer"], resampling=Resampling(50))["auc"].value
        for k in (1, 2)
    )
    assert blind < 0.65 < 0.9 < seeing


@pytest.mark.parametrize("sign", [1, -1])
def test_length_learns_which_way_it_points(sign):
    examples = made.pairs(n=200)
    difference = sign * np.abs(examples.length_difference_P) - sign * 2
    judged = found(replace(examples, length_difference_P=difference))["length"]
    assert measure(examples, judged, resampling=Resampling(50))["pair_accuracy"].value > 0.8


def test_stable_rank_by_hand():
    assert stable_rank(np.eye(4, dtype=np.float32)) == pytest.approx(4.0)
    assert stable_rank(np.ones((5, 3), dtype=np.float32)) == pytest.approx(1.0)
    assert stable_rank(np.diag([2.0, 1.0]).astype(np.float32)) == pytest.approx(5 / 4)
    assert stable_rank(np.empty((0, 3), dtype=np.float32)) == 0.0
