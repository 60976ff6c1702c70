import numpy as np
import pytest

from inward.offline.fit.whitening import whiten
from inward.offline.states.moments import Moments, PairSums


def correlated(n=40, width=30, per_prompt=3, seed=0):
    """Pairs whose noise is far larger along some directions than along the one in which they differ."""
    rng = np.random.default_rng(seed)
    mix, step = rng.normal(size=(width, width)), rng.normal(size=width)
    prompt = rng.normal(size=(n, width))
    chosen, rejected = (((prompt + rng.normal(size=(n, width))) @ mix + s * step + 7) for s in (1, -1))
    return chosen.astype(np.float32), rejected.astype(np.float32), np.arange(n) // per_prompt


def plain(chosen, rejected, lam, scale=1.0):
    """The definition, by a solve: direction and the mean that scores are centred on."""
    rows = np.concatenate([chosen, rejected]).astype(np.float64)
    covariance = np.cov(rows.T, bias=True) * scale
    difference = (chosen.astype(np.float64) - rejected).mean(axis=0)
    return np.linalg.solve(covariance + lam * np.eye(rows.shape[1]), difference), rows.mean(axis=0)


def test_directions_are_the_shrunk_solve():
    chosen, rejected, groups = correlated()
    fit = whiten(PairSums.of(chosen, rejected), chosen, rejected, groups)
    for c, lam, direction in zip(fit.shrinkage, fit.lambda_C, fit.direction_CD, strict=True):
        rows = np.concatenate([chosen, rejected]).astype(np.float64)
        assert lam == pytest.approx(c * np.trace(np.cov(rows.T, bias=True)) / rows.shape[1], rel=1e-5)
        wanted, _ = plain(chosen, rejected, lam)
        np.testing.assert_allclose(direction, wanted / np.linalg.norm(wanted), atol=1e-5)


def test_every_pair_is_judged_by_a_direction_made_without_its_prompt():
    chosen, rejected, groups = correlated()
    fit = whiten(PairSums.of(chosen, rejected), chosen, rejected, groups)
    n = len(chosen)
    for lam, length_sd, scores in zip(fit.lambda_C, fit.sd_C, fit.scores_CM, strict=True):
        length = np.linalg.norm(plain(chosen, rejected, lam)[0])
        for g in np.unique(groups):
            others, own = groups != g, groups == g
            kept = np.concatenate([others, others])
            direction, mean = plain(chosen[others], rejected[others], lam, scale=kept.sum() / (2 * n))
            for side, rows in ((scores[:n], chosen), (scores[n:], rejected)):
                np.testing.assert_allclose(side[own], (rows[own] - mean) @ direction / length / length_sd, atol=1e-4)


def test_in_the_span_of_few_rows_it_is_the_same():
    chosen, rejected, groups = correlated(n=12, width=60, per_prompt=2)
    sums = PairSums.of(chosen, rejected)
    spanned = whiten(sums, chosen, rejected, groups)
    sums.moments.count += 1e-9  # as if there were other rows
    full = whiten(sums, chosen, rejected, groups)
    np.testing.assert_allclose(spanned.direction_CD, full.direction_CD, atol=1e-5)
    np.testing.assert_allclose(spanned.scores_CM, full.scores_CM, atol=1e-4)


def test_the_covariance_may_come_from_responses_without_labels():
    chosen, rejected, groups = correlated()
    sums = PairSums.of(chosen, rejected)
    other = Moments.empty(chosen.shape[1])
    other.add(np.concatenate([chosen, rejected]))
    same = whiten(sums, chosen, rejected, groups, covariance=other)
    np.testing.assert_allclose(same.direction_CD, whiten(sums, chosen, rejected, groups).direction_CD, atol=1e-5)
    round_one = Moments.empty(chosen.shape[1])
    round_one.add(np.random.default_rng(1).normal(size=(4000, chosen.shape[1])).astype(np.float32))
    unwhitened = whiten(sums, chosen, rejected, groups, covariance=round_one)
    assert unwhitened.cosine_C.min() > 0.99, "a round covariance changes no direction"


def test_more_shrinkage_comes_nearer_to_the_mean_difference():
    chosen, rejected, groups = correlated()
    fit = whiten(PairSums.of(chosen, rejected), chosen, rejected, groups)
    assert (np.diff(fit.cosine_C) > 0).all() and fit.cosine_C[-1] > 0.99
    assert (fit.mahalanobis_C <= 1 + 1e-9).all()


def test_whitening_finds_what_noise_hides_from_the_mean_difference():
    chosen, rejected, groups = correlated(n=400, per_prompt=1, seed=3)
    fit = whiten(PairSums.of(chosen, rejected), chosen, rejected, groups)
    agree = (fit.scores_CM[:, :400] > fit.scores_CM[:, 400:]).mean(axis=1)
    assert agree[0] > agree[-1] + 0.1, "little shrinkage is best where the covariance is well known"
