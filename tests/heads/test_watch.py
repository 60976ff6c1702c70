"""Guards and early rejection on made-up numbers of tokens: what they say does not depend on the portions."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inward.errors import DataError, HeadError, InvalidField, NotFound
from inward.heads.base import BackboneRef, Manifest
from inward.heads.guard import GuardThresholds, guard_threshold
from inward.heads.legend import LegendHead
from inward.heads.pooling import Pool
from inward.heads.registry import Registry
from inward.heads.value import Boldness, RejectionCurve, rejection_gaps
from inward.heads.watch import GUARD_INTERVAL, watch
from inward.types import EarlyRejection, SamplingSpec, StopRule
from support.small_heads import legend


def head(name="plain", kind="legend", **more):
    manifest = Manifest(**{
        "name": name, "kind": kind, "version": 1, "created": "", "backbone": BackboneRef(name="x", fingerprint="f"),
        "layers": (1,), "template": "", **more,
    })  # fmt: skip
    return LegendHead(manifest, np.ones((1, 4), np.float32))


class Heads:
    def __init__(self, *heads):
        self._heads = {one.ref.name: one for one in heads}

    def resolve(self, name):
        if name not in self._heads:
            raise NotFound(f"there is no head {name!r}", param="head")
        return self._heads[name]

    def value_of(self, name):
        return next((one for one in self._heads.values() if one.manifest.options.get("of") == name), None)


def numbers(scores):
    return np.array(scores, np.float32)[:, None]


def shown(watching, responses, cuts):
    """Shows the responses' scores in portions of these sizes, one response after the other in each round."""
    at, stops, ended = [0] * len(responses), {}, set()
    sizes = iter(cuts)
    while len(ended) < len(responses):
        for i, scores in enumerate(responses):
            if i in ended:
                continue
            size = next(sizes, 3)
            part = scores[at[i] : at[i] + size]
            at[i] += size
            over = at[i] >= len(scores)
            ended |= {i} if over else set()
            stops |= watching.look({i: [numbers(part)] * len(watching.readouts)} if part else {}, [i] if over else ())
    return stops


RESPONSES = st.lists(st.lists(st.floats(-2, 2, width=32), min_size=0, max_size=24), min_size=1, max_size=5)
PORTIONS = st.lists(st.integers(1, 9), max_size=40)
SPECS = st.sampled_from(
    [
        {"stop_when": StopRule("plain", below=-0.5)},
        {"stop_when": StopRule("plain", below=0.0, pool="mean", after=3)},
        {"early_rejection": EarlyRejection(0.5, (4, 8))},
        {"early_rejection": EarlyRejection(0.5, (2, 5, 11)), "stop_when": StopRule("plain", below=-1, pool="last")},
    ]
)


@given(RESPONSES, PORTIONS, PORTIONS, SPECS)
@settings(max_examples=150, deadline=None)
def test_portions_change_nothing(responses, one, other, options):
    spec = SamplingSpec(len(responses), max_tokens=64, **options)
    stops = [shown(watch(spec, "plain", Heads(head())), responses, cuts) for cuts in (one, other)]
    assert stops[0] == stops[1]
    for i, stop in stops[0].items():
        assert 0 <= stop.given <= len(responses[i])
        assert math.isfinite(stop.score)


@given(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=24), PORTIONS)
@settings(max_examples=100, deadline=None)
def test_a_guard_gives_what_comes_before_the_first_token_that_is_not_safe_and_checks_finished_ones_alike(scores, cuts):
    spec = SamplingSpec(1, stop_when=StopRule("plain", below=0.0, pool="last"))
    watching = watch(spec, "plain", Heads(head()))
    stop = shown(watching, [scores], cuts).get(0)
    unsafe = next((t for t, score in enumerate(scores) if score < 0), None)
    assert (stop and stop.given) == unsafe
    assert watching.check(0, [numbers(scores)]) == stop


@given(
    st.lists(st.floats(-0.5, 2, width=32), min_size=1, max_size=24),
    PORTIONS,
    st.floats(-2, 2, width=32),
    st.sampled_from(["last", "mean", "max_ema"]),
    st.integers(0, 6),
)
@settings(max_examples=300, deadline=None)
def test_what_is_given_while_it_is_drawn_is_given_in_the_end_and_is_safe(scores, cuts, rounding, pool, after):
    """Whatever the portions in which the guard sees the tokens, and however the numbers of its last look differ."""
    rule = StopRule("plain", below=0.0, pool=pool, after=after)
    watching = watch(SamplingSpec(1, stop_when=rule), "plain", Heads(head()))
    given, at, stop, sizes = 0, 0, None, iter(cuts)
    while at < len(scores) and stop is None:
        assert watching.give(0) >= given
        given = watching.give(0)
        assert given <= at
        part = scores[at : at + next(sizes, 3)]
        at += len(part)
        stop = watching.look({0: [numbers(part)]}).get(0)
    if stop is not None:
        assert stop.given >= watching.give(0) >= given
    checked = watching.check(0, [numbers(scores) + np.float32(rounding)])
    if checked is not None:
        assert checked.given >= given
    alone = watch(SamplingSpec(1, stop_when=rule), "plain", Heads(head()))
    if (ended := alone.check(0, [numbers(scores)])) is not None:
        assert given <= ended.given


def test_after_says_how_many_tokens_are_drawn_whatever_they_score_but_only_safe_ones_are_given():
    spec = SamplingSpec(1, stop_when=StopRule("plain", below=0.0, pool="last", after=3))
    scores = [1.0, -1.0, -1.0, -1.0, 1.0]
    assert shown(watch(spec, "plain", Heads(head())), [scores], [])[0].given == 1
    assert shown(watch(spec, "plain", Heads(head())), [[1.0, -1.0, 1.0, 1.0, 1.0]], []) == {}


def test_a_token_without_a_finite_score_is_not_safe():
    spec = SamplingSpec(1, stop_when=StopRule("plain", below=-100.0))
    stop = shown(watch(spec, "plain", Heads(head())), [[1.0, math.nan, 1.0]], [])[0]
    assert stop.given == 1 and math.isnan(stop.score)


def test_the_value_head_of_the_one_that_ranks_decides_else_its_own_mean():
    value = head("value", "value", options={"of": "plain"})
    spec = SamplingSpec(2, early_rejection=EarlyRejection(0.5, (2,)))
    assert watch(spec, "plain", Heads(head(), value)).readouts == (value.readout,)
    stops = shown(watch(spec, "plain", Heads(head())), [[5.0, -9.0, 9.0], [0.0, 0.0, 0.0]], [3, 3])
    assert stops[0].score == -2.0


def test_points_that_no_response_reaches_are_left_out_and_nothing_to_watch_is_none():
    assert watch(SamplingSpec(2, max_tokens=8), "plain", Heads(head())) is None
    beyond = SamplingSpec(2, max_tokens=8, early_rejection=EarlyRejection(0.5, (8, 16)))
    assert watch(beyond, "plain", Heads(head())) is None


def test_looks_are_due_at_decision_points_and_for_a_guard_every_few_tokens():
    rejecting = watch(SamplingSpec(2, early_rejection=EarlyRejection(0.5, (4, 9))), "plain", Heads(head()))
    assert [now for now in range(1, 12) if rejecting.due(now - 1, now)] == [4, 9]
    guarding = watch(SamplingSpec(2, stop_when=StopRule("plain", below=0.0)), "plain", Heads(head()))
    assert [now for now in range(1, 20) if guarding.due(3, now)] == [*range(3 + GUARD_INTERVAL, 20)]


CURVE = RejectionCurve((4, 8), (0.5, 0.25), 8, (Boldness(1.0, 0.1, 0.2, 0.5), Boldness(2.0, 0.01, 0.05, 0.8)))


def test_the_boldest_row_of_the_table_that_keeps_the_loss_sets_the_gaps():
    calibration = {"rejection": CURVE.dump()}
    assert RejectionCurve.load(calibration) == CURVE
    assert rejection_gaps(calibration, 0.2, head="v") == ((4, 8), (0.5, 0.25))
    assert rejection_gaps(calibration, 0.1, head="v") == ((4, 8), (1.0, 0.5))
    with pytest.raises(InvalidField, match=r"0\.05"):
        rejection_gaps(calibration, 0.01, head="v")
    with pytest.raises(InvalidField, match="inward fit value"):
        rejection_gaps({}, 0.1, head="v")
    with pytest.raises(HeadError, match="fit it again"):
        RejectionCurve.load({"rejection": CURVE.dump() | {"deviations": [1.0]}})


def test_a_false_positive_rate_is_the_share_of_acceptable_responses_below_the_threshold():
    lowest = np.random.default_rng(0).normal(size=2000)
    pool = Pool(name="max_ema")
    thresholds = GuardThresholds.fit(pool, lowest)
    calibration = {"guard": [thresholds.dump()]}
    for rate in (0.01, 0.05, 0.15):
        assert np.mean(lowest < guard_threshold(calibration, pool, rate, head="h")) == pytest.approx(rate, abs=0.01)
    with pytest.raises(InvalidField, match="inward fit guard"):
        guard_threshold(calibration, Pool(name="mean"), 0.05, head="h")
    with pytest.raises(InvalidField, match=r"0\.01 to 0\.2"):
        guard_threshold(calibration, pool, 0.5, head="h")
    with pytest.raises(DataError, match="100"):
        GuardThresholds.fit(pool, lowest[:50])


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"stop_when": StopRule("plain", probability=0.5)}, "stop_when.probability"),
        ({"stop_when": StopRule("plain", below=0.0, pool="median")}, "stop_when.pool"),
        ({"stop_when": StopRule("plain", below=0.0, pool="attention")}, "stop_when.pool"),
        ({"stop_when": StopRule("lists", below=0.0)}, "stop_when.pool"),
        ({"early_rejection": EarlyRejection(max_loss=0.1)}, "early_rejection.max_loss"),
        ({"early_rejection": EarlyRejection(0.5, (4,), head="lists")}, "early_rejection.head"),
    ],
)
def test_what_a_head_can_not_do_is_refused_with_the_field_to_blame(options, param):
    manifest = SimpleNamespace(kind="srr", pool=None, options={}, calibration={})
    lists = SimpleNamespace(manifest=manifest, ref=SimpleNamespace(name="lists"))
    with pytest.raises(InvalidField) as refused:
        watch(SamplingSpec(2, **options), "plain", Heads(head(), lists))
    assert refused.value.param == param


def test_a_probability_becomes_a_score_by_the_heads_own_calibration():
    calibrated = head(calibration={"platt": {"slope": 2.0, "intercept": 1.0}})
    spec = SamplingSpec(1, stop_when=StopRule("plain", probability=0.5, pool="last"))
    stops = shown(watch(spec, "plain", Heads(calibrated)), [[0.0, -0.4, -0.6]], [])
    assert stops[0].given == 2


def test_who_ended_early_is_final_once_the_points_that_it_reached_have_passed_and_never_when_rejected():
    """Of three responses two end at once; the third gets to the point later, and then one of the two is rejected."""
    point = 4
    spec = SamplingSpec(3, max_tokens=16, early_rejection=EarlyRejection(0.5, (point,)))
    looks = watch(spec, "plain", Heads(head()))
    decided = []
    looks.on_decided = lambda: decided.append([looks.final(i) for i in range(3)])
    high, low, middle = (np.full((point, 1), score, dtype=np.float32) for score in (3.0, 1.0, 2.0))
    assert looks.look({0: [high], 1: [low]}, [0, 1]) == {}
    assert [looks.final(i) for i in range(2)] == [False, False]
    assert decided == []
    assert set(looks.look({2: [middle]}, [])) == {1}
    assert decided == [[True, False, False]]


def served(*heads):
    return Registry(heads).snapshot()


def ranking(version, created="then"):
    return legend(name="h", version=version, created=created)


def value(name, **of):
    calibration = {"rejection": RejectionCurve((4,), (0.5,), 8, (Boldness(1.0, 0.1, 0.2, 0.5),)).dump()}
    return legend(name=name, kind="value", calibration=calibration, options={"of": "h", **of})


KEEP = SamplingSpec(2, early_rejection=EarlyRejection(0.5, (2,)))
LOSS = SamplingSpec(2, early_rejection=EarlyRejection(max_loss=0.2))


def test_a_value_head_decides_after_online_updates_of_its_head_and_promises_a_loss_for_its_own_version_only():
    first, second = (value(name, of_version=n, of_created="then") for name, n in (("a", 1), ("b", 2)))
    for spec in (KEEP, LOSS):
        assert watch(spec, "h", served(ranking(1), first, second)).readouts == (first.readout,)
        assert watch(spec, "h", served(ranking(2), first, second)).readouts == (second.readout,)
    assert watch(KEEP, "h", served(ranking(3), first, second)).readouts == (first.readout,)
    with pytest.raises(InvalidField, match=r"version 1 of head 'h', .* again for version 3 \(inward fit") as refused:
        watch(LOSS, "h", served(ranking(3), first, second))
    assert refused.value.param == "early_rejection.max_loss"


def test_a_head_that_was_fitted_anew_has_no_value_head_and_the_former_one_promises_nothing_when_it_is_named():
    anew, former = ranking(1, created="now"), value("a", of_version=1, of_created="then")
    assert watch(KEEP, "h", served(anew, former)).readouts == (anew.readout,)
    with pytest.raises(InvalidField, match="again where this one was fitted anew"):
        watch(LOSS, "h", served(anew, former))
    named = SamplingSpec(2, early_rejection=EarlyRejection(max_loss=0.2, head="a"))
    with pytest.raises(InvalidField, match="fitted then, but version 1 of 'h', fitted now, ranks"):
        watch(named, "h", served(anew, former))
    copied = legend(name="guarded", version=1, created="then")  # the same head under another name
    assert watch(named, "guarded", served(copied, former)).readouts == (former.readout,)


def test_a_value_head_that_only_names_its_head_is_taken_for_every_version_of_it():
    old = value("a")
    for of in (ranking(1), ranking(7, created="now")):
        for spec in (KEEP, LOSS):
            assert watch(spec, "h", served(of, old)).readouts == (old.readout,)


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"stop_when": StopRule("gone", below=0.0)}, "stop_when.head"),
        ({"early_rejection": EarlyRejection(keep=0.5, at=(4,), head="gone")}, "early_rejection.head"),
    ],
)
def test_a_head_that_was_unloaded_meanwhile_is_blamed_on_who_named_it(asked, param):
    with pytest.raises(NotFound) as refused:
        watch(SamplingSpec(2, **asked), "plain", Heads(head()))
    assert refused.value.param == param
