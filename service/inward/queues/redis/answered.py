"""Answers under an ``Idempotency-Key``, for all replicas: whichever one the caller reaches when it asks again."""

from __future__ import annotations

import asyncio
import time

from redis.exceptions import RedisError

from inward import logs
from inward.queues.answered import LARGEST, Asked
from inward.queues.redis.connection import Connection, unavailable
from inward.queues.redis.keys import Keys

LOG = logs.logger("queues.redis")
BEGIN = """
local known = redis.call('GET', KEYS[1])
if not known then redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2]) end
return known
"""
FORGET = """
for _, key in ipairs(KEYS) do
  if redis.call('STRLEN', key) == tonumber(ARGV[1]) then redis.call('DEL', key) end
end
"""
"""Of keys under which there is no answer; if an answer got there after all, it is a right one."""
PAUSE = 0.5
"""Seconds between two tries to forget what could not be forgotten because Redis was away."""
HASH = 64
"""Characters of a request's hash, with which every value begins; what follows is the answer, if there is one."""


class RedisAnswered:
    """``keep`` and ``running`` in seconds, as in ``MemoryAnswered``; what they take of Redis' memory is bounded by them."""

    def __init__(self, connection: Connection, keys: Keys, *, keep: float, running: float) -> None:
        self._redis, self._keys, self._keep, self._running = connection, keys, round(keep * 1000), round(running * 1000)
        self._ours: dict[str, float] = {}
        """What is being worked out here, and when Redis lets go of it by itself (monotonic)."""
        self._owed: dict[str, float] = {}
        """The same of what is not, although Redis still says so."""
        self._paying: asyncio.Task[None] | None = None

    async def begin(self, key: str, request: str) -> Asked | None:
        until = time.monotonic() + self._running / 1000
        try:
            known = await self._redis.script(BEGIN, [self._keys.answered(key)], [request, self._running])
        except (RedisError, OSError) as error:
            raise unavailable(error) from error
        if known is None:
            self._ours[key] = until
            self._owed.pop(key, None)
            return None
        return Asked(known[:HASH].decode(), known[HASH:] or None)

    async def finish(self, key: str, request: str, answer: bytes) -> None:
        until = self._ours.pop(key, 0.0)
        if len(answer) > LARGEST:
            await self._forget(key, until)
            return
        try:
            await self._redis("SET", self._keys.answered(key), request.encode() + answer, "PX", self._keep)
        except (RedisError, OSError) as error:
            logs.event(LOG, "answer_not_kept", reason=unavailable(error).message)
            await self._forget(key, until)

    async def forget(self, key: str) -> None:
        await self._forget(key, self._ours.pop(key, 0.0))

    async def _forget(self, key: str, until: float) -> None:
        try:
            await self._redis.script(FORGET, [self._keys.answered(key)], [HASH])
        except (RedisError, OSError) as error:
            logs.event(LOG, "answer_not_forgotten", reason=unavailable(error).message)
            self._owed[key] = until
            if self._paying is None or self._paying.done():
                self._paying = asyncio.create_task(self._pay())

    async def _pay(self) -> None:
        """Forgets what is owed once Redis is back: until then who asks again is told that it is being worked out. What Redis has let go of
        may be somebody else's by now.
        """
        while self._owed:
            await asyncio.sleep(PAUSE)
            now = time.monotonic()
            self._owed = {key: until for key, until in self._owed.items() if until > now}
            owed = list(self._owed)
            try:
                if owed:
                    await self._redis.script(FORGET, [self._keys.answered(key) for key in owed], [HASH])
            except (RedisError, OSError):
                continue
            for key in owed:
                self._owed.pop(key, None)
