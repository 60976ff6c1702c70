import math

import pytest
import torch

from inward_trainer.losses import cdpo_loss, entropy

SEED = torch.Generator().manual_seed(3)


def sample(n=1000):
    z = torch.randn(n, generator=SEED, dtype=torch.float64) * 10
    return z, torch.rand(n, generator=SEED, dtype=torch.float64)


def by_hand(z, gamma):
    def log_sigmoid(x):
        return -math.log1p(math.exp(-x)) if x > -30 else x - math.log1p(math.exp(x))

    return -gamma * log_sigmoid(z) - (1 - gamma) * log_sigmoid(-z)


def test_equals_the_formula():
    z, gamma = sample()
    expected = torch.tensor(
        [by_hand(*pair) for pair in zip(z.tolist(), gamma.tolist(), strict=True)], dtype=torch.float64
    )
    loss = cdpo_loss(z, gamma)
    assert loss.shape == z.shape
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)


def test_the_gradient_is_zero_where_sigmoid_z_is_gamma_and_the_least_loss_is_there():
    gamma = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    z = torch.logit(gamma).requires_grad_()
    loss = cdpo_loss(z, gamma)
    loss.sum().backward()
    torch.testing.assert_close(z.grad, torch.zeros_like(z), rtol=0, atol=1e-12)
    torch.testing.assert_close(loss.detach(), entropy(gamma))
    for step in (-0.1, 0.1):
        assert (cdpo_loss(z.detach() + step, gamma) > loss.detach()).all()


def test_the_gradient_is_sigmoid_z_minus_gamma():
    z, gamma = sample()
    z.requires_grad_()
    cdpo_loss(z, gamma).sum().backward()
    torch.testing.assert_close(z.grad, torch.sigmoid(z.detach()) - gamma)


def test_a_sure_label_pulls_z_up_and_a_surely_wrong_one_down():
    z = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    cdpo_loss(z, torch.tensor([0.9, 0.1], dtype=torch.float64)).sum().backward()
    assert z.grad[0] < 0 < z.grad[1], "with epsilon = gamma instead of 1 - gamma the signs are the other way round"


def test_confidence_one_is_dpo_and_others_are_not():
    z, _ = sample()
    sure = torch.ones_like(z)
    assert torch.equal(cdpo_loss(z, sure), -torch.nn.functional.logsigmoid(z))
    assert not torch.allclose(cdpo_loss(z, sure - 0.1), cdpo_loss(z, sure))


def test_stays_finite_far_out():
    z = torch.tensor([-1e4, 1e4, -1e4, 1e4])
    loss = cdpo_loss(z, torch.tensor([0.0, 1.0, 1.0, 0.0]))
    assert torch.equal(loss, torch.tensor([0.0, 0.0, 1e4, 1e4]))


def test_one_confidence_per_pair():
    with pytest.raises(ValueError, match="one confidence per pair"):
        cdpo_loss(torch.zeros(4), torch.zeros(4, 1))
