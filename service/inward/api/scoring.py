"""A list of items through the corridor: each one's text, tokens and scores, or its error in its place."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from inward import metrics
from inward.api.auth import CALLER
from inward.api.services import Services
from inward.errors import DeadlineExceeded, InwardError, NotFinite, NotFound, ShardAway, Unavailable
from inward.heads.registry import KINDS
from inward.prompts import Grouped, Texts
from inward.types import Detail, Group, HeadRef, Ids, Kind, Scored, Scores, Timing, Usage, slowest
from inward.wire import ErrorDetail, NamedHead, Parts, Scorable, ScoringOptions, TokenUsage

MOST_SWITCHES = 3
"""How often a head may be switched under one request before it gives up."""


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one item: scores, one for each head, or an error."""

    outcome: Scored | InwardError
    truncated: bool = False
    responses_ids: tuple[Ids, ...] = ()
    """What was read as the responses."""

    def scores(self, head: int = 0) -> Scores | None:
        """What the ``head``-th of the heads asked for says, if the item was scored."""
        return (
            self.outcome.scores[head] if isinstance(self.outcome, Scored) and head < len(self.outcome.scores) else None
        )

    def error(self, where: str | None) -> ErrorDetail | None:
        """Why there is no score at ``where``."""
        if isinstance(self.outcome, InwardError):
            return ErrorDetail(**self.outcome.body()["error"])
        if None in self.outcome.scores[0].scores_N:
            return ErrorDetail(**NotFinite("the score is not a finite number", param=where).body()["error"])
        return None


@dataclass(frozen=True, slots=True)
class Results:
    """What became of all items, in their order. At least one was scored, and all that were by one version of head
    and policy.
    """

    results: list[Result]

    @property
    def timing(self) -> Timing:
        """Of the item that took longest."""
        return slowest(r.outcome for r in self.results if isinstance(r.outcome, Scored))

    def named(self, services: Services) -> dict[str, Any]:
        """What every answer names."""
        return named(services, [r.outcome for r in self.results if isinstance(r.outcome, Scored)])


def named(services: Services, scored: Sequence[Scored]) -> dict[str, Any]:
    """The fields of ``wire.Answer`` for what was scored; the first one's head is the answer's."""
    return {
        "model": services.model,
        "policy_version": scored[0].policy_version,
        "head": NamedHead.of(scored[0].heads[0]),
        "usage": TokenUsage.of(sum((outcome.usage for outcome in scored), Usage())),
    }


class Deadline:
    """Seconds that are left of what a request may take."""

    def __init__(self, asked: float | None, limit: float) -> None:
        self._seconds = min(asked or limit, limit)
        self._end = time.monotonic() + self._seconds

    @property
    def left(self) -> float:
        """Seconds.

        Raises:
            DeadlineExceeded: none are left.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded(f"not done within {self._seconds:g} s; send fewer items at once or a longer timeout")
        return left


def find_head(services: Services, name: str | None, kinds: Sequence[Kind], field: str = "head") -> HeadRef:
    """The head that a request names in ``field``, or the first that fits.

    Raises:
        NotFound: there is none.
    """
    try:
        return services.heads.resolve(name, kinds)
    except NotFound as error:
        raise error.at(field) from None


def is_head(services: Services, name: str) -> bool:
    """Whether a head of this name is loaded, of whatever kind."""
    try:
        services.heads.resolve(name, KINDS)
    except NotFound:
        return False
    return True


async def score_all(
    services: Services,
    field: str,
    items: Sequence[Scorable],
    heads: tuple[str, ...],
    options: ScoringOptions,
    *,
    details: frozenset[Detail] = frozenset(),
    pair: bool = False,
) -> Results:
    """Scores ``items``, which came in the request's ``field``. What is wrong with one of them stands in its place.

    Raises:
        InwardError: none of the items could be scored (the first one's error), or the service could not do its part.
    """
    results = await score_each(services, field, items, heads, options, details=details, pair=pair)
    if not any(isinstance(result.outcome, Scored) for result in results):
        raise next(result.outcome for result in results if isinstance(result.outcome, InwardError))
    return Results(results)


async def score_each(
    services: Services,
    field: str | None,
    items: Sequence[Scorable],
    heads: tuple[str, ...],
    options: ScoringOptions,
    *,
    details: frozenset[Detail] = frozenset(),
    pair: bool = False,
) -> list[Result]:
    """As ``score_all``, also where none could be scored. Without a ``field`` an item's error names the item's own.

    Raises:
        InwardError: the service could not do its part.
    """
    deadline = Deadline(options.timeout, services.limits.timeout_s)
    tokenised = await tokenise(services, field, items, truncate=options.truncate)
    groups = [grouped.group for grouped in tokenised if isinstance(grouped, Grouped)]
    outcomes = iter(await score_groups(services, groups, heads, deadline, details=details, pair=pair))
    results: list[Result] = []
    for i, grouped in enumerate(tokenised):
        if isinstance(grouped, InwardError):
            results.append(Result(grouped))
            continue
        outcome = next(outcomes)
        if isinstance(outcome, InwardError) and outcome.param is None:
            outcome = outcome.at(_path(field, i))
        results.append(Result(outcome, grouped.truncated, grouped.group.responses_ids))
    return results


async def tokenise(
    services: Services, field: str | None, items: Sequence[Scorable], *, truncate: bool
) -> list[Grouped | InwardError]:
    """A group for each item, or what is wrong with it, blamed on the field of the request."""
    parts: list[Parts | InwardError] = []
    for item in items:
        try:
            parts.append(item.parts())
        except InwardError as error:
            parts.append(error)
    good = [p for p in parts if isinstance(p, Parts)]
    groups = iter(await services.prompts.group_many([Texts(p.prompt, p.responses, truncate, p.rendered) for p in good]))
    done: list[Grouped | InwardError] = []
    for i, part in enumerate(parts):
        result = next(groups) if isinstance(part, Parts) else part
        if isinstance(result, InwardError):
            param = part.blame(result.param) if isinstance(part, Parts) else result.param
            result = result.at(_path(field, i, param))
        done.append(result)
    return done


def _path(field: str | None, i: int, param: str | None = None) -> str | None:
    """Of an item's own field ``param`` in the whole request."""
    return ".".join(step for step in (field and f"{field}.{i}", param) if step) or None


async def score_groups(
    services: Services,
    groups: Sequence[Group],
    heads: tuple[str, ...],
    deadline: Deadline,
    *,
    details: frozenset[Detail] = frozenset(),
    pair: bool = False,
    counted: bool = False,
) -> list[Scored | InwardError]:
    """Scores groups, all by one version of the heads and the policy and on one backbone: those scored before a switch
    are scored again after it. ``counted``: what they cost was charged before.

    Raises:
        Unavailable, DeadlineExceeded: not the fault of any one group. One whose shard is away stands in its place.
        OverQuota: the key has used up what it may have computed in a minute.
    """

    async def score(some: Sequence[Group]) -> list[Scored | InwardError]:
        outcomes = await services.intake.score(some, heads=heads, details=details, pair=pair, timeout=deadline.left)
        for outcome in outcomes:
            if isinstance(outcome, Unavailable | DeadlineExceeded) and not isinstance(outcome, ShardAway):
                raise outcome
        return outcomes

    if counted:
        latest = outcomes = await score(groups)
    else:
        async with charge(services, groups):
            latest = outcomes = await score(groups)
    switches = 0
    while stale := _stale(outcomes, latest):
        if (switches := switches + 1) > MOST_SWITCHES:
            raise switched_too_often()
        latest = await score([groups[i] for i in stale])
        for i, outcome in zip(stale, latest, strict=True):
            outcomes[i] = outcome
    return outcomes


def switched_too_often() -> Unavailable:
    """Why a request during which heads were switched again and again has no answer."""
    return Unavailable("the head was switched again and again during this request; send it again", retry_after=1.0)


@asynccontextmanager
async def charge(services: Services, groups: Sequence[Group]) -> AsyncIterator[None]:
    """Counts what these cost for the key that the request, or the bulk job, came with, before they are submitted;
    what is not admitted inside costs nothing. A request that was let in is not refused half way.

    Raises:
        OverQuota: the key has used up what it may have computed in a minute.
    """
    if (caller := CALLER.get()) is None:
        yield
        return
    tokens = sum(group.tokens for group in groups)
    limit = caller.quota or services.tokens_a_minute
    quota = services.quota if limit is not None else None
    if quota is not None:
        await quota.spend(caller.id, tokens, None if caller.let_in else limit)
    try:
        yield
    except Unavailable:
        if quota is not None:
            await quota.give_back(caller.id, tokens)
        raise
    caller.let_in = True
    caller.tokens += tokens
    metrics.KEY_TOKENS_TOTAL.labels(key=caller.name).inc(tokens)


def _stale(outcomes: Sequence[Scored | InwardError], latest: Sequence[Scored | InwardError]) -> list[int]:
    """Places of the scores that are of other versions than the last one of ``latest``."""
    newest = next((outcome.version for outcome in reversed(latest) if isinstance(outcome, Scored)), None)
    return [
        i for i, outcome in enumerate(outcomes) if isinstance(outcome, Scored) and newest and outcome.version != newest
    ]
