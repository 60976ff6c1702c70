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

    async def spend(self, caller: str, tokens: int, limit: int) -> None:
        """Counts ``tokens`` for ``caller``, who may have ``limit`` a minute.

        Raises:
            OverQuota: this minute's are used up; ``retry_after`` says when the next one begins.
            Unavailable: the count can't be reached.
        """
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

    async def spend(self, caller: str, tokens: int, limit: int) -> None:
        now = self._clock()
        if now // MINUTE_S != self._minute:
            self._minute, self._used = int(now // MINUTE_S), {}
        used = self._used.get(caller, 0)
        if used >= limit:
            raise over_quota(limit, now)
        self._used[caller] = used + tokens


def over_quota(tokens: int, now: float) -> OverQuota:
    """What a caller is told whose tokens are used up."""
    left = MINUTE_S - now % MINUTE_S
    return OverQuota(f"this key has used up its {tokens} tokens of this minute", retry_after=left)


SPEND = """
-- KEYS: what a caller used in a minute.  ARGV: tokens a minute, tokens to spend, seconds to keep.
-- Gives 1 if there were some left.
if tonumber(redis.call('GET', KEYS[1]) or '0') >= tonumber(ARGV[1]) then return 0 end
redis.call('INCRBY', KEYS[1], ARGV[2])
redis.call('EXPIRE', KEYS[1], ARGV[3])
return 1
"""


class RedisQuota:
    """As ``MemoryQuota``; a minute is that of the replica's clock."""

    def __init__(self, connection: Connection, keys: Keys, *, clock: Callable[[], float] = time.time) -> None:
        self._redis, self._keys, self._clock = connection, keys, clock

    async def spend(self, caller: str, tokens: int, limit: int) -> None:
        now = self._clock()
        key = self._keys.quota(caller, int(now // MINUTE_S))
        left = await self._redis.script(SPEND, [key], [limit, tokens, 2 * MINUTE_S])
        if not left:
            raise over_quota(limit, now)
