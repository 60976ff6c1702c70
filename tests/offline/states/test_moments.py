import numpy as np
import pytest

from inward.errors import DataError
from inward.offline.states.moments import Moments, PairSums, number_format


def rows(n=200, width=7, seed=0):
    """Far from the origin, as deep layers are: naive sums of squares would lose the covariance."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, width)) @ rng.normal(size=(width, width)) + 1000).astype(np.float32)


def test_blocks_of_any_size_add_up_to_the_covariance():
    x = rows()
    moments = Moments.empty(7)
    for start in range(0, 200, 13):
        moments.add(x[start : start + 13])
    assert moments.count == 200
    np.testing.assert_allclose(moments.mean_D, x.mean(axis=0, dtype=np.float64))
    np.testing.assert_allclose(moments.covariance_DD, np.cov(x.T.astype(np.float64), bias=True), rtol=1e-4, atol=1e-4)


def test_parts_merge_and_come_out_again():
    x = rows()
    parts = [Moments.empty(7) for _ in range(3)]
    for part, block in zip(parts, np.split(x, [50, 120]), strict=True):
        part.add(block)
    whole = Moments.empty(7)
    for part in parts:
        whole.merge(part)
    np.testing.assert_allclose(whole.covariance_DD, np.cov(x.T.astype(np.float64), bias=True), rtol=1e-4, atol=1e-4)
    rest = whole.without(parts[1])
    others = np.concatenate([x[:50], x[120:]]).astype(np.float64)
    assert rest.count == len(others)
    np.testing.assert_allclose(rest.covariance_DD, np.cov(others.T, bias=True), rtol=1e-4, atol=1e-4)


def test_a_weight_counts_a_row_that_often():
    x = rows(20)
    times = np.arange(20) % 3
    weighted, repeated = Moments.empty(7), Moments.empty(7)
    weighted.add(x, times.astype(float))
    repeated.add(np.repeat(x, times, axis=0))
    assert weighted.count == repeated.count
    np.testing.assert_allclose(weighted.covariance_DD, repeated.covariance_DD, rtol=1e-4, atol=1e-3)


def test_responses_that_come_apart_give_the_sums_of_their_pairs():
    chosen, rejected = rows(6), rows(6, seed=1)
    rejected[3] = rejected[0]  # one response, rejected twice
    whole, apart = PairSums.of(chosen, rejected), PairSums.empty(7)
    apart.add_responses(chosen, np.ones(6), np.zeros(6))
    apart.add_responses(rejected[[0, 1, 2, 4, 5]], np.zeros(5), np.array([2.0, 1, 1, 1, 1]))
    assert whole.pairs == apart.pairs == 6
    np.testing.assert_allclose(apart.mean_difference_D, whole.mean_difference_D, rtol=1e-5)
    np.testing.assert_allclose(apart.moments.covariance_DD, whole.moments.covariance_DD, rtol=1e-3, atol=1e-3)


def test_sums_outlive_a_file():
    sums = PairSums.of(rows(6), rows(6, seed=1))
    again = PairSums.from_tensors(sums.tensors("3."), "3.")
    assert (again.pairs, again.moments.count) == (6, 12)
    np.testing.assert_array_equal(again.moments.covariance_DD, sums.moments.covariance_DD)


def test_no_difference_is_no_direction():
    with pytest.raises(DataError, match="do not differ"):
        _ = PairSums.of(rows(4), rows(4)).mean_difference_D


def test_many_wide_layers_are_summed_in_single_precision():
    assert number_format(30, 576) is np.float64
    assert number_format(32, 4096) is np.float32
