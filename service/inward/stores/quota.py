"""How much one caller may have computed: tokens in each minute of the clock.

A request is let in as long as the minute's tokens are not used up, whatever it costs itself; so a quota makes no large
request impossible.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from inward.errors import OverQuota
from inward.stores.connection import Connection
from inward.stores.keys import Keys

MINUTE_S = 60


class Quota(Protocol):
    """The tokens of all callers."""

    async def spend(self, caller: str, tokens: int, limit: int | None) -> None:
        """Counts ``tokens`` for ``caller``, who may have ``limit`` a minute; None: who was let in already.

        Raises:
            OverQuota: this minute's are used up; ``retry_after`` says when the next one begins.
            Unavailable: the count can't be reached.
        """
        ...

    async def give_back(self, caller: str, tokens: int) -> None:
        """Of what ``spend`` counted just now, since it was not computed. Raises ``Unavailable``."""
        ...


class MemoryQuota:
    """In this process.

    Args:
        clock: Unix seconds.
    """

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._minute = 0
        self._used: dict[str, int] = {}

    async def spend(self, caller: str, tokens: int, limit: int | None) -> None:
        now = self._clock()
        if now // MINUTE_S != self._minute:
            self._minute, self._used = int(now // MINUTE_S), {}
        used = self._used.get(caller, 0)
        if limit is not None and used >= limit:
            raise over_quota(limit, now)
        self._used[caller] = used + tokens

    async def give_back(self, caller: str, tokens: int) -> None:
        self._used[caller] = max(0, self._used.get(caller, 0) - tokens)


def over_quota(tokens: int, now: float) -> OverQuota:
    """What a caller is told whose tokens are used up."""
    left = MINUTE_S - now % MINUTE_S
    return OverQuota(f"this key has used up its {tokens} tokens of this minute", retry_after=left)


SPEND = """
-- KEYS: what a caller used in a minute.  ARGV: tokens a minute (none: ''), tokens to spend, seconds to keep.
-- Gives 1 if there were some left.
local used = tonumber(redis.call('GET', KEYS[1]) or '0')
if ARGV[1] ~= '' and used >= tonumber(ARGV[1]) then return 0 end
redis.call('INCRBY', KEYS[1], math.max(-used, tonumber(ARGV[2])))
redis.call('EXPIRE', KEYS[1], ARGV[3])
return 1
"""


class RedisQuota:
    """As ``MemoryQuota``; a minute is that of the replica's clock."""

    def __init__(self, connection: Connection, keys: Keys, *, clock: Callable[[], float] = time.time) -> None:
        self._redis, self._keys, self._clock = connection, keys, clock

    async def spend(self, caller: str, tokens: int, limit: int | None) -> None:
        now = self._clock()
        if not await self._counted(caller, tokens, limit, now):
            raise over_quota(limit or 0, now)

    async def give_back(self, caller: str, tokens: int) -> None:
        await self._counted(caller, -tokens, None, self._clock())

    async def _counted(self, caller: str, tokens: int, limit: int | None, now: float) -> bool:
        key = self._keys.quota(caller, int(now // MINUTE_S))
        asked = ["" if limit is None else limit, tokens, 2 * MINUTE_S]
        return bool(await self._redis.script(SPEND, [key], asked))
