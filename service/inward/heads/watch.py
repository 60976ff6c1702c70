"""What the heads say of responses while they are drawn: ``backbones.base.Watch``, for guards and early rejection.

The one place that decides either, whatever draws: it is shown numbers of tokens, in any portions, and says who ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from inward.errors import InvalidField, NotFound
from inward.heads.base import Head
from inward.heads.calibration import Platt
from inward.heads.guard import Guard, guard_threshold
from inward.heads.pooling import Pool
from inward.heads.rejection import Rejecting, Rule, keep_near, keep_share
from inward.heads.running import RunningScore, running_pool, token_scores
from inward.heads.value import check_calibrated_for, rejection_gaps
from inward.types import Doubles, EarlyRejection, Floats, Readout, SamplingSpec, Stop, StopRule

GUARD_INTERVAL = 8
"""Tokens of a response between two looks of a guard, where a look costs something. It sees every token all the same,
and what it has not seen is not given."""


class Heads(Protocol):
    """The loaded heads of one moment: ``registry.Snapshot``."""

    def resolve(self, name: str) -> Head:
        """Raises ``NotFound``."""
        ...

    def value_of(self, name: str) -> Head | None:
        """The value head that predicts this head's reward, if there is one."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class GuardRule:
    """A ``StopRule`` with its head, pool and threshold."""

    head: Head
    pool: Pool
    below: float
    after: int

    def begin(self) -> Guard:
        """For a response that begins."""
        return Guard(self.below, self.pool, self.after)


@dataclass(frozen=True, slots=True, eq=False)
class RejectionRule:
    """An ``EarlyRejection`` with its head, pool, decision points and rule."""

    head: Head
    pool: Pool
    at: tuple[int, ...]
    rule: Rule


def watch(spec: SamplingSpec, ranking: str, heads: Heads) -> HeadWatch | None:
    """What has to look at the responses of a group, if anything has.

    Args:
        ranking: the head that ranks them.

    Raises:
        NotFound: a head is not loaded.
        InvalidField: a head has no score while a response is drawn, or was not calibrated for what is asked for.
    """
    guard = _guard_rule(spec.stop_when, heads) if spec.stop_when else None
    rejection = _rejection_rule(spec.early_rejection, ranking, heads) if spec.early_rejection else None
    at = tuple(point for point in rejection.at if point < spec.max_tokens) if rejection else ()
    return HeadWatch(spec.n, guard, rejection, at) if guard or at else None


def _guard_rule(rule: StopRule, heads: Heads) -> GuardRule:
    head = _head(rule.head, heads, "stop_when.head")
    pool = running_pool(head, rule.pool, Pool(name="max_ema"), param="stop_when.pool")
    return GuardRule(head, pool, _threshold(rule, head, pool), rule.after)


def _head(name: str, heads: Heads, param: str) -> Head:
    try:
        return heads.resolve(name)
    except NotFound as error:  # it was there when the request came
        raise error.at(param) from None


def _threshold(rule: StopRule, head: Head, pool: Pool) -> float:
    if rule.below is not None:
        return rule.below
    if rule.fpr is not None:
        return guard_threshold(head.manifest.calibration, pool, rule.fpr, head=head.ref.name)
    platt = Platt.load(head.manifest.calibration)
    if platt is None or platt.slope <= 0:
        raise InvalidField(
            f"head {head.ref.name!r} is not calibrated for a probability: give stop_when.below, a score",
            param="stop_when.probability",
        )
    p = rule.probability if rule.probability is not None else 0.5
    return (math.log(p / (1 - p)) - platt.intercept) / platt.slope


def _rejection_rule(asked: EarlyRejection, ranking: str, heads: Heads) -> RejectionRule:
    ranks, value = heads.resolve(ranking), heads.value_of(ranking)
    head = _head(asked.head, heads, "early_rejection.head") if asked.head else value or ranks
    pool = running_pool(head, "", Pool(name="mean"), param="early_rejection.head")
    if asked.max_loss is None:
        return RejectionRule(head, pool, asked.at, keep_share(1.0 if asked.keep is None else asked.keep))
    check_calibrated_for(head.manifest, ranks.manifest)
    at, gaps = rejection_gaps(head.manifest.calibration, asked.max_loss, head=head.ref.name)
    return RejectionRule(head, pool, at, keep_near(gaps))


class HeadWatch:
    """See ``backbones.base.Watch``. The numbers of the guard's head come first, those of the one that rejects last;
    where they are the same head, once.
    """

    def __init__(self, n: int, guard: GuardRule | None, rejection: RejectionRule | None, at: Sequence[int]) -> None:
        self._guard, self._rejection = guard, rejection if at else None
        self._guards = {i: guard.begin() for i in range(n)} if guard else {}
        self._running = {i: RunningScore(rejection.pool) for i in range(n)} if rejection and at else {}
        self._rejecting = Rejecting(n, at, rejection.rule) if rejection and at else None
        heads = [rule.head for rule in (guard, self._rejection) if rule]
        self._heads = heads if len({id(head) for head in heads}) == len(heads) else heads[:1]
        self._given: dict[int, int] = {}
        self._rejected: set[int] = set()
        self.readouts: tuple[Readout, ...] = tuple(head.readout for head in self._heads)
        self.guards = guard is not None
        self.on_decided: Callable[[], None] | None = None
        """Called when a decision point has passed: ``final`` may say otherwise now."""

    def due(self, seen: int, now: int) -> bool:
        """At a decision point, and for a guard every ``GUARD_INTERVAL`` tokens."""
        points = self._rejecting.at if self._rejecting else ()
        return (self.guards and now - seen >= GUARD_INTERVAL) or any(seen < point <= now for point in points)

    def look(self, news: Mapping[int, Sequence[Floats]], ended: Iterable[int] = ()) -> dict[int, Stop]:
        """See ``Watch.look``."""
        scores = [
            token_scores(head, {i: values[k] for i, values in news.items() if len(values[k])})
            for k, head in enumerate(self._heads)
        ]
        stops: dict[int, Stop] = {}
        for i, values in news.items():
            if len(values[0]) and (stop := self._tokens(i, [own[i] for own in scores], values)):
                stops[i] = stop
        if self._rejecting is not None:
            self._rejecting.ended([*stops, *ended])
            before = self._rejecting.decided
            for i, (given, score) in self._rejecting.decide().items():
                stops[i] = Stop("rejected", given, score)
                self._rejected.add(i)
            if self.on_decided is not None and self._rejecting.decided > before:
                self.on_decided()
        return stops

    def final(self, index: int) -> bool:
        """Whether this response, which has ended by itself, stays as it is: no look has rejected it, and none will."""
        return self._rejecting is None or not (index in self._rejected or self._rejecting.undecided(index))

    def give(self, index: int) -> int | None:
        """Tokens of a response that may be given while it is drawn, None: all. What was given stays given: ``check``,
        whose numbers may be rounded otherwise, takes nothing of it back.
        """
        if self._guard is None:
            return None
        self._given[index] = self._guards[index].safe
        return self._given[index]

    def check(self, index: int, tokens: Sequence[Floats]) -> Stop | None:
        """See ``Watch.check``."""
        if self._guard is None or not len(tokens[0]):
            return None
        guard = self._guard.begin()
        stop = _guarded(guard, token_scores(self._guard.head, {0: tokens[0]})[0], tokens[0])
        return stop and replace(stop, given=max(stop.given, self._given.get(index, 0)))

    def _tokens(self, i: int, scores: Sequence[Doubles], values: Sequence[Floats]) -> Stop | None:
        """Takes in a response's next tokens, up to the one at which its guard stops it."""
        guard = self._guards.get(i)
        if guard is not None and guard.stopped:
            return None
        before = guard.tokens if guard else 0
        stop = _guarded(guard, scores[0], values[0]) if guard else None
        # where it is stopped the decision points before that token count, and none from it on
        counted = guard.tokens - before - (stop is not None) if guard else len(scores[-1])
        if self._rejecting is not None:
            for score, values_K in zip(scores[-1][:counted], values[-1][:counted], strict=True):
                running = self._running[i]
                value = running.push(float(score), values_K)
                if running.tokens in self._rejecting.at:
                    self._rejecting.reached(i, value)
        return stop


def _guarded(guard: Guard, scores_T: Doubles, values_TK: Floats) -> Stop | None:
    for score, values_K in zip(scores_T, values_TK, strict=True):
        if guard.push(float(score), values_K):
            return Stop("guard", guard.safe, guard.score)
    return None
