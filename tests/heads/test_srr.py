"""SRR head: the module's numbers in numpy, lists of any length, order, isolation, and what it refuses."""

import numpy as np
import pytest
import torch

from inward.errors import HeadError, InvalidField
from inward.heads.base import BackboneRef, Manifest
from inward.heads.srr import SHAPES, SrrHead
from inward.offline.fit.rankers import Ranker, Settings
from inward.types import Reading

D, K = 12, 8


def manifest(**fields):
    known = {
        "name": "srr",
        "kind": "srr",
        "version": 1,
        "created": "2025-01-01T00:00:00Z",
        "template": "t",
        "layers": (3,),
    }
    return Manifest(**{**known, "backbone": BackboneRef(name="b", fingerprint="f"), **fields})


def ranker():
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    mean, scale = 30 * rng.normal(size=D), rng.uniform(1, 20, size=D)
    module = Ranker(mean.astype(np.float32), scale.astype(np.float32), Settings(width=K)).eval()
    with torch.no_grad():
        for parameter in module.parameters():  # away from zero biases and unit norms, which would hide mistakes
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def head(**fields):
    return SrrHead.from_tensors(manifest(**fields), ranker().tensors())


def states(n, seed=1):
    return (20 * np.random.default_rng(seed).normal(size=(n + 1, D))).astype(np.float32)


def read(head, states):
    """What a backbone gives for a prompt's state and those of its candidates."""
    prompt, response = head.readout.taps
    first = np.repeat(states[:1], len(states) - 1, axis=0) @ prompt.weight_DK + prompt.bias_K
    return Reading(
        np.concatenate([first, states[1:] @ response.weight_DK + response.bias_K], axis=1).astype(np.float32)
    )


@pytest.mark.parametrize("n", [1, 2, 7])
def test_numpy_gives_the_modules_cosines(n):
    h = states(n)
    with torch.no_grad():
        want = ranker()(torch.from_numpy(h[:1]), torch.from_numpy(h[None, 1:]), torch.ones(1, n, dtype=torch.bool))[
            0
        ].numpy()
    np.testing.assert_allclose(head().score(read(head(), h)).scores_N, want, atol=1e-5)


def test_padding_in_the_module_changes_nothing():
    h = states(4)
    padded = np.concatenate([h[1:], 1e3 * np.ones((3, D), np.float32)])
    mask = torch.arange(7)[None] < 4
    with torch.no_grad():
        got = ranker()(torch.from_numpy(h[:1]), torch.from_numpy(padded[None]), mask)[0, :4].numpy()
    np.testing.assert_allclose(got, head().score(read(head(), h)).scores_N, atol=1e-5)


def test_readout_projects_prompt_and_response_at_one_layer():
    prompt, response = head(position="mean").readout.taps
    assert (prompt.layer, prompt.position, response.layer, response.position) == (3, "prompt", 3, "mean")
    assert prompt.weight_DK.shape == (D, K) and prompt.weight_DK is response.weight_DK


def test_shares_are_the_softmax_of_the_list_at_the_heads_temperature_and_no_probabilities():
    one = head(options={"tau": 0.5})
    scores = one.score(read(one, states(5)))
    weights = np.exp(np.array(scores.scores_N) / 0.5)
    assert scores.share_N == pytest.approx(weights / weights.sum())
    assert scores.listwise and scores.probability_N is None


def test_order_of_the_candidates_does_not_matter():
    one, h = head(), states(6)
    order = np.array([4, 0, 5, 2, 1, 3])
    there = one.score(read(one, h)).scores_N
    turned = one.score(read(one, np.concatenate([h[:1], h[1:][order]]))).scores_N
    np.testing.assert_allclose(turned, np.array(there)[order], rtol=1e-6)


def test_a_score_depends_on_the_other_candidates():
    one, h = head(), states(6)
    assert abs(one.score(read(one, h)).scores_N[0] - one.score(read(one, h[:3])).scores_N[0]) > 1e-4


def test_a_list_of_one_has_its_cosine_and_no_share():
    scores = head().score(read(head(), states(1)))
    assert -1 <= scores.scores_N[0] <= 1 and scores.share_N is None


def test_a_candidate_that_is_not_finite_is_left_out_and_the_others_are_ranked_without_it():
    one, h = head(), states(4)
    broken = h.copy()
    broken[2, 0] = np.inf
    with np.errstate(invalid="ignore"):
        reading = read(one, broken)
    scores = one.score(reading)
    assert scores.scores_N[1] is None and scores.share_N[1] is None
    alone = one.score(read(one, np.delete(h, 2, axis=0)))
    np.testing.assert_allclose([scores.scores_N[i] for i in (0, 2, 3)], alone.scores_N, rtol=1e-6)
    assert sum(p for p in scores.share_N if p is not None) == pytest.approx(1)


def test_a_list_without_any_finite_candidate_has_no_scores():
    assert head().score(Reading(np.full((2, 2 * K), np.nan, dtype=np.float32))).scores_N == (None, None)


def test_a_pair_is_a_list_of_two():
    calibration = {"margin_std": 0.5, "bin_edges": [0.1, 0.2, 0.3], "bin_values": [0.0, 1 / 3, 2 / 3, 1.0]}
    one = head(calibration=calibration)
    scores = one.score(read(one, states(2)), pair=True)
    margin = scores.scores_N[0] - scores.scores_N[1]
    assert scores.pair.margin == margin and scores.pair.margin_scaled == pytest.approx(margin / 0.5)
    assert scores.pair.label_agrees is (margin > 0)


def test_token_scores_are_refused_with_a_reason():
    with pytest.raises(InvalidField, match="no score for a single token"):
        head().score(read(head(), states(2)), details=frozenset({"tokens"}))


def test_tensor_names_are_the_modules():
    assert set(ranker().state_dict()) == set(SHAPES) == set(head().tensors())


@pytest.mark.parametrize(
    ("fields", "change", "says"),
    [
        ({}, {"type_embedding": np.zeros(K + 1, np.float32)}, "type_embedding"),
        ({}, {"extra": np.zeros(1, np.float32)}, "extra"),
        ({"layers": (1, 2)}, {}, "one layer"),
        ({"position": "prompt"}, {}, "same for all candidates"),
        ({"options": {"tau": 0}}, {}, "options.tau"),
    ],
)
def test_refuses_what_does_not_fit_and_names_it(fields, change, says):
    with pytest.raises(HeadError, match=says):
        SrrHead.from_tensors(manifest(**fields), ranker().tensors() | change)
