"""How many labels are wrong, by the margins of pairs and the labels themselves.

Two estimates, since the usual one counts a judge's own errors as errors of the labels.

``wrong``: a logistic curve with flips (robust logistic regression, Bootkrajang and Kabán, ECML 2012). A label is what
the curve says, and with probability ``share`` it was turned round:

    P(label | margin) = (1 - share) sigmoid(k margin) + share sigmoid(-k margin)

``share`` and ``k`` are most likely together, on a grid. A judge that is weak has a flat curve; labels that are wrong
keep the curve from its ends. No held-out calibration is needed.

``flagged``: confident learning (Northcutt et al., JAIR 2021, arXiv 1911.00068) on out-of-fold probabilities p. A pair
has two classes, "the first is better" and "the second is", and shown the other way round it has the other one; so both
have the same threshold t = mean of p, and the labels with 1 - p >= t and p < 1/2 are the ones that it would call wrong.
The number is that of ``cleanlab`` on pairs shown both ways round, which a test compares; it is written out because an
interval needs hundreds of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit

from inward.offline.data.pairs import grouped_folds, whole_prompts
from inward.offline.evaluate.statistics import Estimate, Resampling, mean
from inward.types import Doubles, Indices

FOLDS = 5
FEWEST_PROMPTS = 20
"""Of which a share of wrong labels is estimated."""
BINS = 256
"""Of margins, each with its mean: what lies in one is one to the likelihood."""
SLOPES = np.geomspace(0.05, 30.0, 48)
"""Of the curve, for margins whose root mean square is 1."""
SHARES = np.linspace(0.0, 0.49, 50)
STEEPEST = 100.0
"""Slope of a curve through labels that are all right, which have no finite best one."""
RESAMPLES = 500
MOST_PAIRS = 20_000
"""That an estimate is made from, of more."""


@dataclass(frozen=True, slots=True, eq=False)
class Noise:
    """Of one set of pairs."""

    wrong: Estimate
    """Share of labels that are wrong."""
    flagged: Estimate
    """Share that confident learning calls wrong: an upper bound in practice."""
    slope: float
    """The curve's, for the margins as they are."""

    def posterior(self, margin_N: Doubles) -> Doubles:
        """Probability that each label is wrong, ``[N]``."""
        right_N, wrong_N = expit(self.slope * margin_N), expit(-self.slope * margin_N)
        share = self.wrong.value
        return np.asarray(share * wrong_N / np.maximum((1 - share) * right_N + share * wrong_N, 1e-300))


def noise(margin_N: Doubles, groups_N: Indices, *, resamples: int = RESAMPLES) -> Noise | None:
    """Both estimates with their 95 % intervals over prompts.

    Args:
        margin_N: in favour of the label, by a head that was fitted on other prompts; without ties.
        groups_N: the prompt of each pair.

    Returns:
        None of too few prompts, or where the margins speak against most labels: the head can't judge these.
    """
    if len(np.unique(groups_N)) < FEWEST_PROMPTS or float(np.mean(margin_N > 0)) <= 0.5:
        return None
    some = _some(groups_N)
    margin_N, groups_N = margin_N[some], groups_N[some]
    spread = float(np.sqrt(np.mean(margin_N**2)))
    bin_N, centre_C = _bins(margin_N / spread)
    log_GC = _log_likelihood(centre_C)
    member_NC = np.eye(len(centre_C), dtype=np.float32)[bin_N]

    def share(weights_BN: Doubles) -> Doubles:
        best_B = np.argmax(log_GC @ (weights_BN @ member_NC).T, axis=0)
        return np.asarray(SHARES[best_B % len(SHARES)])

    resampling = Resampling(resamples)
    wrong = resampling.estimate(share, groups_N)
    best = int(np.argmax(log_GC @ np.bincount(bin_N, minlength=len(centre_C))))
    p_N = out_of_fold(margin_N, groups_N)
    flagged = resampling.estimate(lambda weights_BN: confident(p_N, weights_BN), groups_N)
    assert wrong is not None and flagged is not None
    return Noise(wrong, flagged, float(SLOPES[best // len(SHARES)]) / spread)


def agreement(margin_N: Doubles, groups_N: Indices) -> Estimate | None:
    """Share of labels that the margins agree with; None of a single prompt."""
    some = _some(groups_N)
    return Resampling(RESAMPLES).estimate(mean(margin_N[some] > 0), groups_N[some])


def out_of_fold(margin_N: Doubles, groups_N: Indices) -> Doubles:
    """Probability of each label as it is given, ``[N]``, by a logistic curve through zero that was fitted on the labels
    of other prompts.
    """
    probability_N = np.empty(len(margin_N))
    for train, held_out in grouped_folds(groups_N, FOLDS, 0):
        probability_N[held_out] = expit(slope(margin_N[train]) * margin_N[held_out])
    return probability_N


def slope(margin_N: Doubles) -> float:
    """The logistic curve's, at least 0: most likely where every label says that its margin should be above zero."""
    spread = float(np.sqrt(np.mean(margin_N**2)))
    if not spread:
        return 0.0
    x_N = margin_N / spread

    def gradient(k: float) -> float:
        return float(np.mean(x_N * expit(-k * x_N)))

    if gradient(0.0) <= 0:
        return 0.0
    if gradient(STEEPEST) >= 0:
        return STEEPEST / spread
    return float(brentq(gradient, 0.0, STEEPEST)) / spread


def confident(p_N: Doubles, weights_BN: Doubles) -> Doubles:
    """Share of labels that confident learning calls wrong, ``[B]``, of weighted rows."""
    order_N: Indices = np.argsort(p_N, kind="stable")
    total_B = weights_BN.sum(axis=1)
    threshold_B = np.maximum((weights_BN @ p_N) / total_B, 0.5)
    below_BN = np.concatenate([np.zeros((len(weights_BN), 1)), np.cumsum(weights_BN[:, order_N], axis=1)], axis=1)
    # strictly below one half: a curve that is flat calls no label wrong
    wrong = np.searchsorted(p_N[order_N], np.minimum(1 - threshold_B, np.nextafter(0.5, 0)), "right")
    return np.asarray(below_BN[np.arange(len(weights_BN)), wrong] / total_B, dtype=np.float64)


def _some(groups_N: Indices) -> Indices:
    """About ``MOST_PAIRS`` rows: all those of some prompts, or where too few prompts would stay, a row in so many of
    every prompt and at least one of the first ones.
    """
    if len(groups_N) <= MOST_PAIRS:
        return np.arange(len(groups_N), dtype=np.int64)
    first_P = np.unique(groups_N, return_index=True)[1][:FEWEST_PROMPTS]
    if len(first_P) == FEWEST_PROMPTS:
        whole = whole_prompts(groups_N, MOST_PAIRS)
        if len(np.unique(groups_N[whole])) >= FEWEST_PROMPTS:
            return whole
    step = -(-len(groups_N) // MOST_PAIRS)
    return np.union1d(np.argsort(groups_N, kind="stable")[::step], first_P)


def _bins(margin_N: Doubles) -> tuple[Indices, Doubles]:
    """Of each margin its bin, ``[N]``, and the mean of each bin, ``[C]``."""
    if len(margin_N) <= BINS:
        return np.arange(len(margin_N)), margin_N
    edges = np.unique(np.quantile(margin_N, np.linspace(0, 1, BINS + 1)[1:-1]))
    _, bin_N = np.unique(np.searchsorted(edges, margin_N, "right"), return_inverse=True)
    return bin_N, np.bincount(bin_N, margin_N) / np.bincount(bin_N)


def _log_likelihood(centre_C: Doubles) -> Doubles:
    """``[G, C]`` of every slope with every share."""
    right_SC = expit(SLOPES[:, None] * centre_C)
    mixed_SRC = (1 - SHARES[:, None]) * right_SC[:, None] + SHARES[:, None] * (1 - right_SC[:, None])
    return np.asarray(np.log(np.maximum(mixed_SRC, 1e-300)).reshape(-1, len(centre_C)))
