"""Who is rejected depends on scores at the decision points alone, whatever the pace at which responses are drawn."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inward.heads.rejection import Rejecting, keep_near, keep_share

SCORES = st.floats(-5, 5) | st.just(math.nan)


@st.composite
def runs(draw):
    """Scores of each response at the points that it reaches, and an order in which the news come."""
    points = draw(st.integers(1, 4))
    reached = draw(st.lists(st.lists(SCORES, min_size=0, max_size=points), min_size=1, max_size=8))
    news = [i for i, scores in enumerate(reached) for _ in range(len(scores) + 1)]
    return points, reached, draw(st.permutations(news)), draw(st.permutations(news))


def decided(points, reached, order, rule):
    """What was rejected, and how many news of each response were taken in before."""
    rejecting = Rejecting(len(reached), range(1, points + 1), rule)
    rejected, seen = {}, [0] * len(reached)
    for i in order:
        if seen[i] < len(reached[i]):
            rejecting.reached(i, reached[i][seen[i]])
        else:
            rejecting.ended([i])
        seen[i] += 1
        rejected |= rejecting.decide()
    return rejected


def same(one, other):
    return str(sorted(one.items())) == str(sorted(other.items()))


@given(runs(), st.sampled_from([keep_share(0.5), keep_share(0.25), keep_near([0.5, 1.0, 0.0, 2.0])]))
@settings(max_examples=200, deadline=None)
def test_the_order_of_the_news_changes_nothing_and_somebody_is_always_left(run, rule):
    points, reached, one, other = run
    rejected = decided(points, reached, one, rule)
    assert same(rejected, decided(points, reached, other, rule))
    assert len(rejected) < len(reached)
    for i, (at, score) in rejected.items():
        assert same({0: reached[i][at - 1]}, {0: score})


@given(runs())
@settings(max_examples=100, deadline=None)
def test_at_every_point_the_share_that_goes_on_is_the_best_of_those_that_run(run):
    points, reached, order, _ = run
    rejected = decided(points, reached, order, keep_share(0.5))
    running = set(range(len(reached)))
    for point in range(points):
        here = {i for i in running if len(reached[i]) > point}
        out = {i for i, (at, _) in rejected.items() if at == point + 1}
        assert len(here - out) == math.ceil(len(here) / 2)
        lowest = min((reached[i][point] for i in here - out if not math.isnan(reached[i][point])), default=-math.inf)
        assert all(math.isnan(reached[i][point]) or reached[i][point] <= lowest for i in out)
        running -= out


def test_nobody_is_rejected_before_all_that_run_have_reached_the_point():
    rejecting = Rejecting(3, [8], keep_share(0.34))
    rejecting.reached(0, 1.0)
    rejecting.reached(1, 2.0)
    assert rejecting.decide() == {}
    rejecting.ended([2])
    assert rejecting.decide() == {0: (8, 1.0)}
    assert rejecting.decide() == {}


def test_who_ended_before_the_point_is_not_compared():
    rejecting = Rejecting(2, [8], keep_share(0.5))
    rejecting.ended([0])
    rejecting.reached(1, -9.0)
    assert rejecting.decide() == {}


@pytest.mark.parametrize(("gap", "out"), [(0.0, {1, 2}), (1.0, {2}), (3.0, set())])
def test_near_the_highest_means_within_the_gap(gap, out):
    assert keep_near([gap])(0, {0: 2.0, 1: 1.0, 2: -1.0}) == out
    assert keep_near([gap])(0, {0: math.nan, 1: math.nan}) == set()
