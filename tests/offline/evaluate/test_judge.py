import json
from dataclasses import replace

import numpy as np
import pytest

from inward.errors import DataError
from inward.heads.base import Manifest
from inward.heads.hybrid import HybridHead
from inward.heads.legend import LegendHead
from inward.offline.evaluate.judge import judge
from inward.offline.evaluate.metrics import NAMES, measure
from inward.offline.evaluate.scoring import Judged, score, score_folds
from inward.offline.evaluate.statistics import Resampling
from support import made_examples as made
from support.small_heads import legend, manifest


def hybrid(layers=(1, 2, 3), width=12, platt=True):
    """Reads the axis that ``made`` puts the difference on, at each layer."""
    n = len(layers)
    weight = np.zeros((n, width), dtype=np.float32)
    weight[:, 0] = 1.0
    calibration = {"platt": {"slope": 1.0, "intercept": -2.0}} if platt else {}
    about = Manifest.model_validate(
        {**manifest().model_dump(), "name": "made", "kind": "hybrid", "layers": layers, "calibration": calibration}
    )
    ones, zeros = np.ones((n, width), dtype=np.float32), np.zeros((n, width), dtype=np.float32)
    tensors = {
        "probe_weight": weight,
        "probe_bias": np.zeros(n),
        "gate_weight": np.zeros((n, n)),
        "mean": zeros,
        "scale": ones,
    }
    return HybridHead.from_tensors(about, {name: t.astype(np.float32) for name, t in tensors.items()})


def test_a_head_scores_stored_states_as_its_formula_says():
    examples = made.pairs()
    expected = 0.5 * examples.states_MLD[:, :, 0].sum(axis=1)  # a gate of zeros is one half
    judged = score(hybrid(), examples)
    np.testing.assert_allclose(judged.scores_M, expected, rtol=1e-5)
    np.testing.assert_allclose(judged.layer_scores_LM, examples.states_MLD[:, :, 0].T, rtol=1e-5)
    np.testing.assert_allclose(judged.probability_M, 1 / (1 + np.exp(2 - expected)), rtol=1e-5)


def test_each_response_is_scored_by_the_head_of_its_fold():
    examples = made.pairs()
    folds = made.folds(examples, k=3)
    heads = [legend(seed, width=12) for seed in range(3)]
    judged = score_folds(heads, folds, examples)
    for head, (_, held_out) in zip(heads, folds, strict=True):
        np.testing.assert_allclose(
            judged.scores_M[held_out], examples.states_MLD[held_out, 1] @ head.direction, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    ("head", "said"),
    [
        (legend(width=12, layers=(9,)), "layer 9, the states hold layers 1, 2, 3"),
        (legend(width=5), "width 5, these are 12 wide"),
        (legend(width=12, position="eos"), "position 'eos', the states are of 'last'"),
    ],
)
def test_states_that_a_head_does_not_read_are_refused(head, said):
    with pytest.raises(DataError, match=said):
        score(head, made.pairs())


def test_report_has_the_same_keys_for_every_input():
    for examples in (made.pairs(), made.pairs(lengths=False), made.lists()):
        judgement = judge(examples, made.truth(examples, 1.0), made.folds(examples), resampling=Resampling(20))
        report = judgement.to_json()
        assert list(report) == ["metrics", "baselines", "layers", "strategies", "over_refusal", "guard", "parts"]
        assert list(report["metrics"]) == list(NAMES)
        for entry in report["baselines"].values():
            assert {"about", "forward_pass"} < entry.keys()
        assert [row["layer"] for row in report["layers"]] == list(examples.layers)
        assert {"probe_accuracy", "probe_auc"} < report["layers"][0].keys()
        json.dumps(report, allow_nan=False)


def test_lists_are_compared_with_first_random_and_oracle():
    examples = made.lists()
    references = judge(examples, made.truth(examples, 5.0), resampling=Resampling(50)).to_json()["baselines"]
    mixed = [examples.safe_M[rows] for rows in examples.mixed]
    assert references["first"]["top1_safe_rate"]["value"] == pytest.approx(np.mean([s[0] for s in mixed]))
    assert references["random"]["top1_safe_rate"]["value"] == pytest.approx(np.mean([s.mean() for s in mixed]))
    assert references["oracle"]["top1_safe_rate"]["value"] == 1.0


def test_strategies_use_the_heads_own_layers():
    examples = made.pairs(n=200)
    found = {one.name: one for one in judge(examples, score(hybrid(), examples), resampling=Resampling(50)).strategies}
    assert list(found) == ["best layer", "ours", "last layer", "random layer", "worst layer"]
    assert (found["best layer"].layer, found["last layer"].layer, found["worst layer"].layer) == (2, 3, 1)
    assert (
        found["worst layer"].estimate.value < found["random layer"].estimate.value < found["best layer"].estimate.value
    )


def test_intervals_of_strategies_are_resampled_as_all_others_are_without_baselines_too():
    examples, ours = made.pairs(n=200), score(hybrid(), made.pairs(n=200))
    by_name = {one.name: one.estimate for one in judge(examples, ours, resampling=Resampling(50, 3)).strategies}
    assert by_name["ours"] == measure(examples, ours, resampling=Resampling(50, 3))["pair_accuracy"]


def test_without_baselines_nothing_is_fitted():
    examples = made.pairs()
    judgement = judge(examples, score(legend(width=12), examples), resampling=Resampling(20))
    assert judgement.to_json()["baselines"] == {}
    assert judgement.strategies == ()


@pytest.mark.parametrize(
    ("wins", "verdict"), [(1.0, "prefers refusing"), (0.0, "prefers helping"), (None, "can't be said")]
)
def test_over_refusal_is_said_in_a_sentence(wins, verdict):
    examples = made.lists(g=40)
    refusals = np.array([[5 * g, 5 * g + 1] for g in range(40)])
    scores = np.zeros(len(examples))
    scores[refusals[:, 0]] = wins if wins is not None else np.arange(40) % 2
    scores[refusals[:, 1]] = 0.5
    said = judge(replace(examples, refusals_P2=refusals), Judged(scores), resampling=Resampling(200)).to_json()[
        "over_refusal"
    ]
    assert verdict in said["sentence"]
    assert "40 comparisons on 40 prompts" in said["sentence"]
    assert said["safe_prompts"]["refusal_wins"]["value"] == (wins if wins is not None else 0.5)


def test_a_head_that_gives_no_finite_score_is_refused():
    examples = made.pairs()
    broken = LegendHead(manifest(), np.eye(12, dtype=np.float32)[0])
    states = examples.states_MLD.copy()
    states[0, 1, 0] = np.inf
    with pytest.raises(DataError, match="1 of 160 responses no finite score"):
        score(broken, replace(examples, states_MLD=states))
