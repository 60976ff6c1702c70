"""cDPO (arXiv 2503.10093, eq. 5): DPO for labels that are right with a known probability."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cdpo_loss(z: Tensor, confidence: Tensor) -> Tensor:
    """``-gamma log sigmoid(z) - (1 - gamma) log sigmoid(-z)``, elementwise; its minimum is at ``sigmoid(z) = gamma``.

    The paper calls epsilon what is ``1 - gamma`` here. In one place it says epsilon = gamma; that would turn good pairs
    round.

    Args:
        z: ``[B]``, beta times (log-ratio of chosen minus log-ratio of rejected), policy against reference.
        confidence: ``[B]``, gamma: the probability that the label is right. 1 is plain DPO.

    Returns:
        ``[B]``.

    Raises:
        ValueError: shapes differ (broadcasting ``[B]`` with ``[B, 1]`` would give a loss that trains towards nothing).
    """
    if z.shape != confidence.shape:
        raise ValueError(f"one confidence per pair: z is {list(z.shape)}, confidence {list(confidence.shape)}")
    return -confidence * F.logsigmoid(z) - (1 - confidence) * F.logsigmoid(-z)


def entropy(confidence: Tensor) -> Tensor:
    """``[B]``: the least value that ``cdpo_loss`` can take, reached at ``sigmoid(z) = gamma``."""
    least: Tensor = torch.special.entr(confidence) + torch.special.entr(1 - confidence)
    return least
