"""Answers that are kept for callers who ask again with the same ``Idempotency-Key``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from redis.exceptions import RedisError

from inward import logs
from inward.stores.connection import Connection, unavailable
from inward.stores.keys import Keys

LARGEST = 2**20
"""Bytes of an answer that is kept; a larger one is worked out again."""


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """Somebody asked under this key before. ``answer`` is None while it is being worked out."""

    request: str
    """Hash of what was asked."""
    answer: bytes | None = None


class IdempotencyStore(Protocol):
    """Exactly one of those who begin at once under one key is told to go on."""

    async def begin(self, key: str, request: str) -> StoredResponse | None:
        """What is known under ``key``; None: nothing, go on, and call ``finish`` or ``forget``.

        Raises:
            Unavailable: the store can't be reached.
        """
        ...

    async def finish(self, key: str, request: str, answer: bytes) -> None:
        """Keeps the answer for a while. A store that is away or full keeps nothing."""
        ...

    async def forget(self, key: str) -> None:
        """There is no answer to keep: who asks again is told to go on."""
        ...


class MemoryIdempotencyStore:
    """In this process.

    Args:
        keep: seconds for which an answer is kept.
        running: seconds after which one that never came is given up.
        room: bytes of all answers; the oldest go first.
    """

    def __init__(
        self, *, keep: float, running: float, room: int = 64 * 2**20, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._keep, self._running, self._room, self._clock = keep, running, room, clock
        self._known: dict[str, tuple[float, StoredResponse]] = {}  # the oldest first
        self._bytes = 0

    async def begin(self, key: str, request: str) -> StoredResponse | None:
        now = self._clock()
        for old in [name for name, (until, _) in self._known.items() if until <= now]:
            self._drop(old)
        if key in self._known:
            return self._known[key][1]
        self._known[key] = (now + self._running, StoredResponse(request))
        return None

    async def finish(self, key: str, request: str, answer: bytes) -> None:
        self._drop(key)
        if len(answer) > LARGEST:
            return
        self._known[key] = (self._clock() + self._keep, StoredResponse(request, answer))
        self._bytes += len(answer)
        while self._bytes > self._room:
            self._drop(next(name for name, (_, asked) in self._known.items() if asked.answer is not None))

    async def forget(self, key: str) -> None:
        self._drop(key)

    def _drop(self, key: str) -> None:
        _, asked = self._known.pop(key, (0.0, StoredResponse("")))
        self._bytes -= len(asked.answer or b"")


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


class RedisIdempotencyStore:
    """``keep`` and ``running`` in seconds, as in ``MemoryIdempotencyStore``; what they take of Redis' memory is
    bounded by them.
    """

    def __init__(self, connection: Connection, keys: Keys, *, keep: float, running: float) -> None:
        self._redis, self._keys, self._keep, self._running = connection, keys, round(keep * 1000), round(running * 1000)
        self._ours: dict[str, float] = {}
        """What is being worked out here, and when Redis lets go of it by itself (monotonic)."""
        self._owed: dict[str, float] = {}
        """The same of what is not, although Redis still says so."""
        self._paying: asyncio.Task[None] | None = None

    async def begin(self, key: str, request: str) -> StoredResponse | None:
        until = time.monotonic() + self._running / 1000
        try:
            known = await self._redis.script(BEGIN, [self._keys.answered(key)], [request, self._running])
        except (RedisError, OSError) as error:
            raise unavailable(error) from error
        if known is None:
            self._ours[key] = until
            self._owed.pop(key, None)
            return None
        return StoredResponse(known[:HASH].decode(), known[HASH:] or None)

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
        """Forgets what is owed once Redis is back: until then who asks again is told that it is being worked out. What
        Redis has let go of may be somebody else's by now.
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
