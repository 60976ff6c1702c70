"""Online update of a hybrid head (arXiv 2503.10093): the policy moves, so do its states, and the head follows in small
steps.

Gradients are written out by hand, since heads know no torch. With ``delta = R_c - R_r - mu`` and the loss ``mean(-log
sigmoid(delta))``:

    dLoss/dR_c = -sigmoid(-delta) / N = -dLoss/dR_r
    dR/dt      = g + V^T q        dR/dV = q t^T        q = dR/d(V t):  t g (1 - g)  (sigmoid),  g (t - R)  (softmax)
    dt_l/dw_l  = z_l              dt_l/db_l = 1
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from inward.errors import InvalidField, NotFinite
from inward.heads.calibration import sigmoid
from inward.heads.hybrid import HybridHead, gates
from inward.types import Doubles, Floats


class Gradients(NamedTuple):
    """The loss of a batch of pairs and its gradient for each tensor that learns."""

    loss: float
    probe_weight_LD: Doubles
    probe_bias_L: Doubles
    gate_weight_LL: Doubles


def pair_gradients(head: HybridHead, chosen_NLD: Floats, rejected_NLD: Floats, *, mu: float = 1.0) -> Gradients:
    """Gradients of ``mean(-log sigmoid(R_c - R_r - mu))`` over N pairs of raw states at the head's layers."""
    n, v = len(chosen_NLD), head.gate_weight_LL.astype(np.float64)
    z_MLD = (np.concatenate([chosen_NLD, rejected_NLD]).astype(np.float64) - head.mean_LD) / head.scale_LD
    t_ML = np.einsum("mld,ld->ml", z_MLD, head.probe_weight_LD.astype(np.float64)) + head.probe_bias_L
    g_ML = gates(t_ML, v, head.options.gate)
    reward_M = (g_ML * t_ML).sum(axis=1)
    delta_N = reward_M[:n] - reward_M[n:] - mu
    slope_N = -sigmoid(-delta_N) / n
    slope_M1 = np.concatenate([slope_N, -slope_N])[:, None]
    q_ML = t_ML * g_ML * (1 - g_ML) if head.options.gate == "sigmoid" else g_ML * (t_ML - reward_M[:, None])
    dt_ML = slope_M1 * (g_ML + q_ML @ v)
    return Gradients(
        loss=float(np.logaddexp(0, -delta_N).mean()),
        probe_weight_LD=np.einsum("ml,mld->ld", dt_ML, z_MLD),
        probe_bias_L=dt_ML.sum(axis=0),
        gate_weight_LL=(slope_M1 * q_ML).T @ t_ML,
    )


def online_step(
    head: HybridHead, chosen_NLD: ArrayLike, rejected_NLD: ArrayLike, lr: float = 1e-3, *, mu: float = 1.0
) -> HybridHead:
    """One step of gradient descent on labelled pairs; gives a new head with the next version, the old one stays as it
    is.

    The step on a probe is divided by D. A standardised state has a squared length near D, so ``lr`` is how far the step
    moves a probe's *output* per unit of slope, whatever the width of the backbone; undivided, one step at 1e-3 would
    throw the probes of a 4096-wide model far away. Standardisation and calibration stay.

    Args:
        head: the active version.
        chosen_NLD: raw states of the chosen responses at ``head.manifest.layers`` and its position, N of at least 1.
        rejected_NLD: of the rejected ones, in the same order.
        lr: step length.
        mu: margin of the loss.

    Raises:
        InvalidField: states of another shape than ``[N, L, D]`` of the head.
        NotFinite: states or a result that are not finite; the head is unchanged.
    """
    chosen, rejected = np.asarray(chosen_NLD, dtype=np.float32), np.asarray(rejected_NLD, dtype=np.float32)
    wanted = head.probe_weight_LD.shape
    if chosen.ndim != 3 or not len(chosen) or chosen.shape != rejected.shape or chosen.shape[1:] != wanted:
        raise InvalidField(
            f"an update needs states [N, {wanted[0]}, {wanted[1]}] of chosen and rejected, N at least 1; "
            f"these are {list(chosen.shape)} and {list(rejected.shape)}"
        )
    if not (np.isfinite(chosen).all() and np.isfinite(rejected).all()):
        raise NotFinite(
            f"the update of head {head.manifest.name!r} was not applied: states of its pairs are NaN or infinite"
        )
    gradients = pair_gradients(head, chosen, rejected, mu=mu)
    tensors = {
        **head.tensors(),
        "probe_weight": (head.probe_weight_LD - lr / wanted[1] * gradients.probe_weight_LD).astype(np.float32),
        "probe_bias": (head.probe_bias_L - lr * gradients.probe_bias_L).astype(np.float32),
        "gate_weight": (head.gate_weight_LL - lr * gradients.gate_weight_LL).astype(np.float32),
    }
    if not all(np.isfinite(tensor).all() for tensor in tensors.values()):
        raise NotFinite(
            f"the update of head {head.manifest.name!r} was not applied: its result is not finite, lr {lr} is too large"
        )
    fit = {**head.manifest.fit, "online_steps": head.manifest.fit.get("online_steps", 0) + 1}
    manifest = head.manifest.model_copy(update={"version": head.manifest.version + 1, "fit": fit})
    return HybridHead.from_tensors(manifest, tensors)
