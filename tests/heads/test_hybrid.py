"""Hybrid head: formulas, calibration, isolation of what is not finite, and what it refuses."""

import math

import numpy as np
import pytest

from inward.errors import HeadError, InvalidField
from inward.heads.base import BackboneRef, Manifest
from inward.heads.hybrid import HybridHead, confidence
from inward.types import PairScores, Reading

L, D = 3, 5
CALIBRATION = {
    "platt": {"slope": 2.0, "intercept": -0.5},
    "platt_pair": {"slope": 1.5, "intercept": 0.0},
    "margin_std": 2.0,
    "bin_edges": [0.1, 0.2, 0.3],
    "bin_values": [0.0, 1 / 3, 2 / 3, 1.0],
}


def manifest(**fields):
    known = {
        "name": "hybrid",
        "kind": "hybrid",
        "version": 1,
        "created": "2025-01-01T00:00:00Z",
        "template": "t",
        "layers": (1, 2, 4),
    }
    return Manifest(**{**known, "backbone": BackboneRef(name="b", fingerprint="f"), **fields})


def tensors(seed=0):
    rng = np.random.default_rng(seed)
    draws = {"probe_weight": (L, D), "probe_bias": (L,), "gate_weight": (L, L), "mean": (L, D), "scale": (L, D)}
    drawn = {name: rng.normal(size=shape).astype(np.float32) for name, shape in draws.items()}
    return drawn | {"mean": 50 * drawn["mean"], "scale": np.abs(drawn["scale"]) + 0.1}


def head(**fields):
    return HybridHead.from_tensors(manifest(**fields), tensors())


def read(head, states_NLD):
    """What a backbone gives for these states."""
    columns = [states_NLD[:, l] @ tap.weight_DK + tap.bias_K for l, tap in enumerate(head.readout.taps)]
    return Reading(np.concatenate(columns, axis=1).astype(np.float32))


def states(n, seed=1):
    return (50 * np.random.default_rng(seed).normal(size=(n, L, D))).astype(np.float32)


def by_hand(states_LD, gate="sigmoid"):
    """The formulas, one layer at a time."""
    t = tensors()
    z = (states_LD.astype(np.float64) - t["mean"]) / t["scale"]
    values = [float(t["probe_weight"][l] @ z[l] + t["probe_bias"][l]) for l in range(L)]
    logits = t["gate_weight"].astype(np.float64) @ values
    gates = 1 / (1 + np.exp(-logits)) if gate == "sigmoid" else np.exp(logits) / np.exp(logits).sum()
    return values, gates, float(gates @ values)


def test_readout_has_one_number_a_layer_at_the_manifests_position():
    taps = head(position="eos", final_norm=True).readout.taps
    assert [(tap.layer, tap.position, tap.weight_DK.shape, tap.bias_K.shape) for tap in taps] == [
        (k, "eos", (D, 1), (1,)) for k in (1, 2, 4)
    ]
    assert [tap.final_norm for tap in taps] == [False, False, True]


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
def test_score_is_the_formula_on_standardised_states(gate):
    one, h = head(options={"gate": gate}), states(4)
    scores = one.score(read(one, h), details=frozenset({"layers"}))
    for n in range(4):
        values, gates, reward = by_hand(h[n], gate)
        assert scores.scores_N[n] == pytest.approx(reward, rel=1e-4)
        assert scores.layers_N[n].values == pytest.approx(values, rel=1e-4)
        assert scores.layers_N[n].gates == pytest.approx(gates, rel=1e-3, abs=1e-6)
        assert scores.layers_N[n].layers == (1, 2, 4)


def test_probability_is_calibrated_or_absent():
    reading = Reading(np.ones((1, L), dtype=np.float32))
    scores = head(calibration=CALIBRATION).score(reading)
    assert scores.probability_N[0] == pytest.approx(1 / (1 + math.exp(-(2.0 * scores.scores_N[0] - 0.5))))
    assert head().score(reading).probability_N is None


def test_only_the_response_that_is_not_finite_has_no_score():
    values = np.ones((3, L), dtype=np.float32)
    values[1, 2] = np.nan
    scores = head(calibration=CALIBRATION).score(Reading(values), details=frozenset({"layers"}))
    assert scores.scores_N[1] is None and scores.probability_N[1] is None
    assert scores.layers_N[1].values == (1.0, 1.0, None)
    alone = head(calibration=CALIBRATION).score(Reading(values[:1]))
    assert scores.scores_N[0] == scores.scores_N[2] == alone.scores_N[0]


def test_an_infinite_probe_gives_no_score_rather_than_infinity():
    assert head().score(Reading(np.full((1, L), np.inf, dtype=np.float32))).scores_N == (None,)


def test_token_scores_are_the_reward_at_every_token():
    one, h = head(), states(6)
    tokens = read(one, h).values_NK
    scores = one.score(Reading(tokens[-1:], (tokens,)), details=frozenset({"tokens"}))
    assert scores.tokens_N[0] == pytest.approx([by_hand(state)[2] for state in h], rel=1e-4)
    assert scores.tokens_N[0][-1] == scores.scores_N[0]
    both = one.score(Reading(tokens[-1:], (tokens,)), details=frozenset({"tokens", "layers"}))
    assert scores.map_N is None
    assert [sum(row) for row in both.map_N[0]] == pytest.approx(scores.tokens_N[0], rel=1e-6)
    assert {len(row) for row in both.map_N[0]} == {len(one.manifest.layers)}


def test_pair_gives_margin_bin_agreement_and_both_confidences():
    one = head(calibration=CALIBRATION)
    reading = read(one, states(2))
    scores = one.score(reading, pair=True)
    chosen, rejected = scores.scores_N
    margin = chosen - rejected
    assert scores.pair.margin == margin and scores.pair.margin_scaled == pytest.approx(margin / 2)
    assert scores.pair.label_agrees is (margin > 0)
    assert scores.pair.confidence == pytest.approx(float(confidence(chosen, rejected)))
    assert scores.pair.label_probability == pytest.approx(1 / (1 + math.exp(-1.5 * margin)))
    turned = one.score(Reading(reading.values_NK[::-1]), pair=True).pair
    assert turned.margin == -margin and turned.label_agrees is (margin < 0)
    assert turned.label_probability == pytest.approx(1 - scores.pair.label_probability)


def test_pair_without_a_finite_score_has_no_confidence():
    pair = (
        head(calibration=CALIBRATION)
        .score(Reading(np.array([[1, 1, 1], [np.nan, 1, 1]], dtype=np.float32)), pair=True)
        .pair
    )
    assert pair == PairScores()


def test_confidence_options_come_from_the_manifest():
    one = head(options={"confidence": {"alpha": 1.0, "squash": False, "floor": None}})
    scores = one.score(read(one, states(2)), pair=True)
    assert scores.pair.confidence == pytest.approx(1 / (1 + math.exp(-scores.pair.margin)), rel=1e-6, abs=1e-12)


def test_confidence_values_of_equation_8():
    assert confidence(1.0, 0.0, squash=False) == pytest.approx(0.99945, abs=1e-5)
    squashed = 7.5 * (1 / (1 + math.exp(-1)) - 0.5)
    assert confidence(1.0, 0.0) == pytest.approx(1 / (1 + math.exp(-squashed)))
    assert confidence(0.0, 0.0) == 0.5


def test_confidence_grows_with_the_difference_and_never_falls_below_the_floor():
    gammas = confidence(np.linspace(-3, 3, 13), np.zeros(13))
    assert (gammas[:7] == 0.5).all() and (np.diff(gammas[6:]) > 0).all()
    assert confidence(-1.0, 0.0, floor=None) == pytest.approx(1 - confidence(1.0, 0.0, floor=None))
    assert confidence(-1.0, 0.0, floor=None) < 0.5
    assert confidence(-9.0, 9.0, floor=0.2) == 0.2


def test_tensors_come_back_as_they_went_in():
    for name, tensor in head().tensors().items():
        assert np.array_equal(tensor, tensors()[name])


@pytest.mark.parametrize(
    ("fields", "change", "says"),
    [
        ({}, {"gate_weight": np.zeros((L, L + 1), np.float32)}, "gate_weight"),
        ({"layers": (1, 2)}, {}, "probe_weight"),
        ({}, {"scale": np.zeros((L, D), np.float32)}, "not positive"),
        ({"options": {"gate": "relu"}}, {}, "options.gate"),
        ({"options": {"confidence": {"alpha": -1}}}, {}, "options.confidence.alpha"),
        ({"calibration": {"platt": {"slope": 1}}}, {}, "platt"),
    ],
)
def test_refuses_what_does_not_fit_and_names_it(fields, change, says):
    with pytest.raises(HeadError, match=says):
        HybridHead.from_tensors(manifest(**fields), tensors() | change)


def test_a_pair_must_have_two_responses():
    with pytest.raises(InvalidField, match="two responses"):
        head().score(Reading(np.ones((3, L), dtype=np.float32)), pair=True)
