"""Online step: gradients against autograd, direction, versions, and what it refuses."""

import numpy as np
import pytest
import torch

from inward.errors import InvalidField, NotFinite
from inward.heads.base import BackboneRef, Manifest
from inward.heads.hybrid import HybridHead
from inward.heads.online import online_step, pair_gradients

N, L, D = 7, 3, 16


def head(gate="sigmoid"):
    rng = np.random.default_rng(0)
    manifest = Manifest(
        name="hybrid",
        kind="hybrid",
        version=4,
        created="2025-01-01T00:00:00Z",
        template="t",
        layers=(1, 2, 3),
        backbone=BackboneRef(name="b", fingerprint="f"),
        options={"gate": gate},
    )
    tensors = {
        "probe_weight": 0.3 * rng.normal(size=(L, D)),
        "probe_bias": rng.normal(size=L),
        "gate_weight": rng.normal(size=(L, L)),
        "mean": rng.normal(size=(L, D)),
        "scale": rng.uniform(0.5, 2, size=(L, D)),
    }
    return HybridHead.from_tensors(manifest, {name: tensor.astype(np.float32) for name, tensor in tensors.items()})


def pairs(seed=1):
    return np.random.default_rng(seed).normal(size=(2, N, L, D)).astype(np.float32)


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
def test_gradients_are_those_of_autograd(gate):
    one, (chosen, rejected) = head(gate), pairs()
    w, b, v = (
        torch.from_numpy(x).double().requires_grad_()
        for x in (one.probe_weight_LD, one.probe_bias_L, one.gate_weight_LL)
    )

    def rewards(states):
        t = (
            (torch.from_numpy(states).double() - torch.from_numpy(one.mean_LD)) / torch.from_numpy(one.scale_LD) * w
        ).sum(-1) + b
        logits = t @ v.T
        return ((torch.sigmoid(logits) if gate == "sigmoid" else logits.softmax(-1)) * t).sum(-1)

    loss = -torch.nn.functional.logsigmoid(rewards(chosen) - rewards(rejected) - 1).mean()
    loss.backward()
    ours = pair_gradients(one, chosen, rejected)
    assert ours.loss == pytest.approx(loss.item(), rel=1e-9)
    for mine, theirs in zip(ours[1:], (w.grad, b.grad, v.grad), strict=True):
        np.testing.assert_allclose(mine, theirs.numpy(), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
def test_a_step_lowers_the_loss_of_its_batch_and_is_small(gate):
    before, (chosen, rejected) = head(gate), pairs()
    after = online_step(before, chosen, rejected)
    fall = pair_gradients(before, chosen, rejected).loss - pair_gradients(after, chosen, rejected).loss
    assert 0 < fall < 0.05


def test_repeated_steps_learn_the_pairs():
    one, (chosen, rejected) = head(), pairs()
    for _ in range(50):
        one = online_step(one, chosen, rejected, lr=0.3)
    assert pair_gradients(one, chosen, rejected).loss < 0.3 < pair_gradients(head(), chosen, rejected).loss


def test_a_step_makes_the_next_version_and_leaves_the_old_head_alone():
    before = head()
    kept = {name: tensor.copy() for name, tensor in before.tensors().items()}
    after = online_step(before, *pairs())
    assert (before.manifest.version, after.manifest.version) == (4, 5)
    assert online_step(after, *pairs()).manifest.fit["online_steps"] == 2
    assert all(np.array_equal(before.tensors()[name], kept[name]) for name in kept)
    assert np.array_equal(after.mean_LD, before.mean_LD) and not np.array_equal(
        after.gate_weight_LL, before.gate_weight_LL
    )
    assert not np.array_equal(after.readout.taps[0].weight_DK, before.readout.taps[0].weight_DK)


def test_refuses_states_of_another_shape():
    chosen, rejected = pairs()
    for wrong in ((chosen[:, :2], rejected[:, :2]), (chosen, rejected[:3]), (chosen[:0], rejected[:0])):
        with pytest.raises(InvalidField, match="N at least 1"):
            online_step(head(), *wrong)


def test_refuses_states_that_are_not_finite():
    chosen, rejected = pairs()
    chosen[2, 1, 3] = np.nan
    with pytest.raises(NotFinite, match="not applied"):
        online_step(head(), chosen, rejected)
