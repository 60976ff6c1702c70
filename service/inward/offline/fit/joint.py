"""The joint part of a hybrid head's fit (arXiv 2503.10093): all probes and the gate together, with a margin loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from inward.heads.hybrid import Gate
from inward.offline.fit.probes import Doubles


@dataclass(frozen=True, slots=True)
class Joint:
    """The joint training; rates and margin are the paper's."""

    mu: float = 1.0
    lr: float = 1e-3
    weight_decay: float = 0.01
    steps: int = 200
    """At most: cross-validation says when to stop."""
    every: int = 5
    """Steps between two looks at the held-out pairs."""


class Parameters(NamedTuple):
    """Probes in ``Coordinates``, their biases, and the gate."""

    probe_LR: Tensor
    bias_L: Tensor
    gate_LL: Tensor

    def rewards(self, points_LMR: Tensor, gate: Gate) -> Tensor:
        """``[M]``"""
        t_ML = torch.bmm(points_LMR, self.probe_LR[:, :, None])[..., 0].T + self.bias_L
        logits_ML = t_ML @ self.gate_LL.T
        g_ML = torch.sigmoid(logits_ML) if gate == "sigmoid" else torch.softmax(logits_ML, dim=1)
        return (g_ML * t_ML).sum(dim=1)


class Trained(NamedTuple):
    parameters: Parameters
    held_out: Doubles
    """``[S, M]``: rewards of the held-out rows at the start and after every so many steps."""


def train_jointly(
    start: Parameters, points_LMR: Doubles, gate: Gate, joint: Joint, steps: int, held_out_LMR: Doubles | None = None
) -> Trained:
    """Minimises ``mean(-log sigmoid(R_c - R_r - mu))`` over probes, biases and gate with AdamW, all pairs in every
    step.

    Adam moves every coordinate by about ``lr``, so a probe's output would move by up to ``lr sqrt(R)`` in R
    coordinates, far beyond a warm start in a few steps. Coordinates divided by sqrt(R) make ``lr`` the movement of an
    output, whatever R is, as in ``heads.online``. Weight decay is decoupled, since Adam's own would depend on that
    scale.
    """
    root = points_LMR.shape[2] ** 0.5
    points = torch.from_numpy(points_LMR / root).float()
    judged = None if held_out_LMR is None else torch.from_numpy(held_out_LMR / root).float()
    parameters = Parameters(start.probe_LR * root, start.bias_L.clone(), start.gate_LL.clone())
    optimizer = torch.optim.AdamW(
        [p.requires_grad_() for p in parameters], lr=joint.lr, weight_decay=joint.weight_decay
    )
    n = points.shape[1] // 2
    path = []
    for step in range(steps + 1):
        if judged is not None and step % joint.every == 0:
            with torch.no_grad():
                path.append(parameters.rewards(judged, gate).double().numpy())
        if step < steps:
            rewards_M = parameters.rewards(points, gate)
            loss = torch.nn.functional.softplus(joint.mu - (rewards_M[:n] - rewards_M[n:])).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    probe_LR, bias_L, gate_LL = (parameter.detach() for parameter in parameters)
    return Trained(Parameters(probe_LR / root, bias_L, gate_LL), np.array(path))
