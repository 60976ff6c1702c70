"""Identical items in several replicas: one computes, the others watch until there is an outcome, or until it is
theirs to compute.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from redis.exceptions import RedisError

from inward import codec, logs
from inward.errors import Unavailable
from inward.stores.connection import RETRY_AFTER, Arg, Connection, reachable, unavailable
from inward.stores.keys import Keys
from inward.types import Job, Scored

Content = bytes
"""Hash of all that an outcome depends on."""
PAUSES = (0.02, 0.25)
"""Seconds between two looks, at first and at most."""
GRACE = 1.0
"""Seconds for which a computation may have neither an open job nor an outcome: it is about to be submitted, or its
outcome to be stored."""


@dataclass(frozen=True, slots=True)
class Begun:
    """Somebody's computation of a content. ``who`` names it and what became of it."""

    who: str
    runs: bool = False
    """Its job is open."""
    scored: Scored | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of our own; without an outcome it is somebody else's turn."""

    content: Content
    job_id: str
    scored: Scored | None


class Leases(Protocol):
    """Where replicas tell each other what they compute."""

    async def begin(self, asked: Sequence[tuple[Content, str, str]]) -> list[Begun | None]:
        """For each content, job and ``who`` that is of no use: what others have begun; None: it is for that job to
        compute, then ``end``.

        Raises:
            Unavailable: can't be asked.
        """
        ...

    async def end(self, ended: Sequence[Ended]) -> None:
        """Tells the others. Changes nothing for what somebody else took over meanwhile; never raises for a store
        that is away.
        """
        ...


@dataclass(slots=True, eq=False)
class _Watched:
    content: Content
    job: Job
    outcome: asyncio.Future[Scored | None]
    useless: str = ""
    quiet: tuple[str, float] | None = None
    """Whose job is not open, and since when."""


class LeaseWatch:
    """One replica's.

    Args:
        current: whether an outcome is what would be computed now.
        clock: monotonic seconds.
    """

    def __init__(
        self, elsewhere: Leases, *, current: Callable[[Scored], bool], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._elsewhere, self._current, self._clock = elsewhere, current, clock
        self._ended: list[Ended] = []
        self._telling: asyncio.Task[None] | None = None
        self._looking: set[asyncio.Task[None]] = set()

    async def begin(self, jobs: Mapping[Content, Job]) -> dict[Content, asyncio.Future[Scored | None]]:
        """Those that others compute: each future gives the outcome, or None when it is for its job after all. The rest
        are ours at once.

        Raises:
            Unavailable: the others can't be asked.
        """
        loop = asyncio.get_running_loop()
        watched = [_Watched(content, job, loop.create_future()) for content, job in jobs.items()]
        await self._ask(watched)
        theirs = [one for one in watched if not (one.outcome.done() and one.outcome.result() is None)]
        if any(not one.outcome.done() for one in theirs):
            task = asyncio.create_task(self._look(theirs))
            self._looking.add(task)
            task.add_done_callback(self._looking.discard)
        return {one.content: one.outcome for one in theirs}

    def end(self, content: Content, job_id: str, scored: Scored | None) -> None:
        """What was ours is done; the others hear of it soon, of all that end together at once."""
        self._ended.append(Ended(content, job_id, scored))
        if self._telling is None or self._telling.done():
            self._telling = asyncio.create_task(self._tell())

    async def _tell(self) -> None:
        while self._ended:
            ended, self._ended = self._ended, []
            await self._elsewhere.end(ended)

    async def _look(self, watched: Sequence[_Watched]) -> None:
        """Until all have an outcome, are ours, or were given up. While the store is away nothing is known: it goes
        on.
        """
        pause = PAUSES[0]
        try:
            while watched := [one for one in watched if not one.outcome.done()]:
                await asyncio.sleep(pause)
                pause = min(1.5 * pause, PAUSES[1])
                try:
                    await self._ask(watched)
                except Unavailable:
                    pause = PAUSES[1]
        finally:
            for one in watched:
                if not one.outcome.done():
                    one.outcome.set_result(None)

    async def _ask(self, watched: Sequence[_Watched]) -> None:
        found = await self._elsewhere.begin([(one.content, one.job.id, one.useless) for one in watched])
        for one, begun in zip(watched, found, strict=True):
            if one.outcome.done():  # given up while we asked
                if begun is None:
                    self.end(one.content, one.job.id, None)
            elif begun is None:
                one.outcome.set_result(None)
            elif begun.scored is not None and self._current(begun.scored):
                one.outcome.set_result(begun.scored)
            else:
                self._doubt(one, begun)

    def _doubt(self, one: _Watched, begun: Begun) -> None:
        if begun.runs:
            one.quiet = None
        elif begun.scored is not None:  # of versions that are not served any more
            one.useless = begun.who
        elif one.quiet is None or one.quiet[0] != begun.who:
            one.quiet = (begun.who, self._clock())
        elif self._clock() - one.quiet[1] > GRACE:
            one.useless = begun.who


LOG = logs.logger("queues.redis")
LARGEST = 2**16
"""Bytes of an outcome that is kept; a larger one (the scores of every token) is computed again."""

BEGIN = """
-- KEYS: open, then contents.  ARGV: milliseconds for which a computation counts, then for each content: job, what is known to be of no use.
-- Values are "?<job>" while it runs and "=<job> <outcome>" afterwards.  Gives for each: '' (go on), the outcome, or {who, is its job open}.
local found = {}
for i = 2, #KEYS do
  local job, useless = ARGV[2 * i - 2], ARGV[2 * i - 1]
  local value = redis.call('GET', KEYS[i])
  local who = value and string.match(value, '^%S+')
  if not value or who == useless then
    redis.call('SET', KEYS[i], '?' .. job, 'PX', ARGV[1])
    found[#found + 1] = ''
  elseif string.sub(value, 1, 1) == '=' then
    found[#found + 1] = value
  else
    found[#found + 1] = {who, redis.call('HEXISTS', KEYS[1], string.sub(who, 2))}
  end
end
return found
"""

END = """
-- KEYS: contents.  ARGV: milliseconds to keep, then for each: job, outcome ('': none).  What another one took over is left alone.
for i = 1, #KEYS do
  local job, outcome = ARGV[2 * i], ARGV[2 * i + 1]
  if redis.call('GET', KEYS[i]) == '?' .. job then
    if outcome == '' then redis.call('DEL', KEYS[i])
    else redis.call('SET', KEYS[i], '=' .. job .. ' ' .. outcome, 'PX', ARGV[1]) end
  end
end
"""


class RedisLeases:
    """What it takes of Redis' memory is bounded by the window.

    Args:
        window: seconds for which an outcome is kept.
        running: seconds after which a computation that left nothing is forgotten.
        away: why Redis is known not to be had; None while it is.
    """

    def __init__(
        self, connection: Connection, keys: Keys, *, window: float, running: float, away: Callable[[], str | None]
    ) -> None:
        self._redis, self._keys, self._away = connection, keys, away
        self._window, self._running = round(window * 1000), round(running * 1000)

    async def begin(self, asked: Sequence[tuple[Content, str, str]]) -> list[Begun | None]:
        if (away := self._away()) is not None:
            raise Unavailable(away, retry_after=RETRY_AFTER)
        keys = [self._keys.book[0], *(self._keys.shared(content.hex()) for content, _, _ in asked)]
        args: list[Arg] = [self._running, *(arg for _, job_id, useless in asked for arg in (job_id, useless))]
        with reachable():
            found = await self._redis.script(BEGIN, keys, args)
        return [_begun(one) for one in found]

    async def end(self, ended: Sequence[Ended]) -> None:
        data = [b"" if one.scored is None else codec.encode(one.scored) for one in ended]
        args: list[Arg] = [self._window]
        for one, outcome in zip(ended, data, strict=True):
            args += (one.job_id, outcome if len(outcome) <= LARGEST else b"")
        try:
            await self._redis.script(END, [self._keys.shared(one.content.hex()) for one in ended], args)
        except (RedisError, OSError) as error:  # those who wait see that the job is not open any more
            logs.event(LOG, "outcomes_not_shared", reason=unavailable(error).message)


def _begun(found: bytes | list[bytes | int]) -> Begun | None:
    if isinstance(found, list):
        who, runs = found
        assert isinstance(who, bytes)
        return Begun(who.decode(), runs=bool(runs))
    who, _, outcome = found.partition(b" ")
    if not outcome:
        return None
    try:
        scored = codec.decode_outcome(outcome)
    except codec.Unreadable:  # of a newer version: as if it were not there, until it expires
        return Begun(who.decode())
    return Begun(who.decode(), scored=scored) if isinstance(scored, Scored) else Begun(who.decode())
