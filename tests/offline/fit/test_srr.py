"""Fitting SRR heads: loss, lists, what is learnt, and that it is the same twice."""

import io

import numpy as np
import pytest
import torch
from rich.console import Console

from inward.errors import DataError
from inward.offline.fit.rankers import Lists, Settings, listwise_loss
from inward.offline.fit.srr import fit_srr
from inward.offline.states.saved import ListStates
from inward.types import Reading

QUICK = {"settings": Settings(width=8, epochs=25, lr=5e-3, patience=8), "folds": 2, "progress": False}


def lists(g=30, m=6, d=10, seed=0, strength=1.5):
    """Candidates near their prompt; the safe ones moved along one direction at layer 4, not at layer 2."""
    rng = np.random.default_rng(seed)
    direction = np.random.default_rng(99).normal(size=d)
    prompt = rng.normal(size=(g, 2, d))
    group = np.repeat(np.arange(g), m)
    safe = rng.random(g * m) < 0.4
    shift = np.where(safe, strength, -strength)[:, None, None] * direction * np.array([0.0, 1.0])[:, None]
    candidates = prompt[group] + rng.normal(size=(g * m, 2, d)) + shift
    return ListStates(
        (20 * prompt).astype(np.float32), (20 * candidates).astype(np.float32), group, safe, (2, 4), np.arange(g)
    )


def test_the_sweep_finds_the_layer_and_the_ranker_picks_safe_answers():
    states = lists()
    head, report = fit_srr(states, **QUICK)
    assert report.layer == 4 and head.manifest.layers == (4,)
    assert report.top1["srr"] > report.top1["random"] + 0.3
    fresh = lists(seed=5)
    prompt, response = head.readout.taps
    picks = []
    for g in range(len(fresh)):
        rows = np.flatnonzero(fresh.group_M == g)
        first = np.repeat(fresh.prompt_GLD[g : g + 1, 1] @ prompt.weight_DK + prompt.bias_K, len(rows), axis=0)
        values = np.concatenate([first, fresh.candidates_MLD[rows, 1] @ response.weight_DK + response.bias_K], axis=1)
        picks.append(fresh.safe_M[rows[np.argmax(head.score(Reading(values)).scores_N)]])
    assert np.mean(picks) > fresh.safe_M.mean() + 0.3


def test_same_data_and_seed_give_the_same_head_bit_for_bit():
    quick = QUICK | {"settings": Settings(width=8, epochs=3)}
    heads = [fit_srr(lists(), layer=4, seed=2, baselines=False, **quick)[0] for _ in range(2)]
    for name, tensor in heads[0].tensors().items():
        assert np.array_equal(tensor, heads[1].tensors()[name])
    other, _ = fit_srr(lists(), layer=4, seed=3, baselines=False, **quick)
    assert not np.array_equal(other.tensors()["projection.weight"], heads[0].tensors()["projection.weight"])


def test_a_fit_leaves_the_callers_random_state_and_threads_alone():
    torch.manual_seed(0)
    want, threads = torch.rand(1), torch.get_num_threads()
    torch.manual_seed(0)
    fit_srr(lists(), layer=4, baselines=False, **(QUICK | {"settings": Settings(width=8, epochs=1)}))
    assert torch.equal(torch.rand(1), want) and torch.get_num_threads() == threads


def test_loss_is_the_divergence_from_uniform_over_the_safe_candidates():
    scores, safe = torch.tensor([[0.3, -0.2, 0.9]]), torch.tensor([[True, False, True]])
    p = torch.softmax(scores[0] / 0.2, 0)
    want = 0.5 * (torch.log(0.5 / p[0]) + torch.log(0.5 / p[2]))
    assert listwise_loss(scores, safe, torch.ones_like(safe), 0.2).item() == pytest.approx(want.item(), rel=1e-5)


def test_loss_and_its_gradient_ignore_padding():
    mask = torch.tensor([[True, True, False]])
    safe = torch.tensor([[True, False, True]])
    losses, gradients = [], []
    for padding in (0.0, 1e4):
        scores = torch.tensor([[0.3, -0.2, padding]], requires_grad=True)
        loss = listwise_loss(scores, safe, mask, 0.2)
        loss.backward()
        losses.append(loss.item())
        gradients.append(scores.grad)
    assert losses[0] == losses[1] and torch.equal(*gradients)
    assert gradients[0][0, 2] == 0 and torch.isfinite(gradients[0]).all()


def test_drawn_lists_are_short_enough_and_always_mixed():
    states = lists(g=8, m=20)
    states.safe_M[:] = np.arange(len(states.safe_M)) % 20 == 13
    drawn = Lists(states, 4).draw(np.arange(8), 10, np.random.default_rng(0))
    for g, rows in enumerate(drawn):
        assert len(rows) == len(set(rows)) == 10 and (states.group_M[rows] == g).all()
        assert states.safe_M[rows].sum() == 1
    assert len({int(np.argmax(states.safe_M[rows])) for rows in drawn}) > 1


def test_lists_without_contrast_are_left_out_and_counted():
    states = lists()
    states.safe_M[states.group_M < 10] = True
    _, report = fit_srr(states, layer=4, baselines=False, **(QUICK | {"settings": Settings(width=8, epochs=2)}))
    assert report.lists == 30 and report.mixed_lists <= 20
    states.safe_M[:] = True
    with pytest.raises(DataError, match="both a safe and an unsafe"):
        fit_srr(states, **QUICK)


def test_a_fraction_of_the_depth_takes_the_nearest_layer():
    quick = QUICK | {"settings": Settings(width=8, epochs=1)}
    assert fit_srr(lists(), layer=0.45, baselines=False, **quick)[1].layer == 2
    with pytest.raises(DataError, match="layer 3"):
        fit_srr(lists(), layer=3, **quick)


def test_report_compares_with_the_other_scorers_and_simple_choices():
    head, report = fit_srr(lists(), layer=4, **QUICK)
    assert list(report.top1) == ["srr", "linear", "mlp", "first", "random", "oracle"]
    assert head.manifest.fit["metrics"]["top1"] == report.top1
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(report)
    assert "held-out loss" in console.export_text()
