"""Answers that are kept for callers who ask again with the same ``Idempotency-Key``."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Protocol

from inward import logs
from inward.errors import Unavailable
from inward.stores.connection import Connection
from inward.stores.keys import Keys

LOG = logs.logger("stores")
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
    """In this process. What it costs to begin does not grow with the number of keys.

    Args:
        keep: seconds for which an answer is kept.
        running: seconds after which one that never came is given up.
        room: bytes of all answers; the oldest go first.
    """

    def __init__(
        self, *, keep: float, running: float, room: int = 64 * 2**20, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._keep, self._running, self._room, self._clock = keep, running, room, clock
        # each with the time at which it is let go of; the oldest first, since all of one kind live equally long
        self._begun: OrderedDict[str, tuple[float, str]] = OrderedDict()
        self._kept: OrderedDict[str, tuple[float, StoredResponse]] = OrderedDict()
        self._bytes = 0

    async def begin(self, key: str, request: str) -> StoredResponse | None:
        now = self._clock()
        while self._begun and next(iter(self._begun.values()))[0] <= now:
            self._begun.popitem(last=False)
        while self._kept and next(iter(self._kept.values()))[0] <= now:
            self._drop(next(iter(self._kept)))
        if key in self._kept:
            return self._kept[key][1]
        if key in self._begun:
            return StoredResponse(self._begun[key][1])
        self._begun[key] = (now + self._running, request)
        return None

    async def finish(self, key: str, request: str, answer: bytes) -> None:
        await self.forget(key)
        if len(answer) > LARGEST:
            return
        self._kept[key] = (self._clock() + self._keep, StoredResponse(request, answer))
        self._bytes += len(answer)
        while self._bytes > self._room:
            self._drop(next(iter(self._kept)))

    async def forget(self, key: str) -> None:
        self._begun.pop(key, None)
        self._drop(key)

    def _drop(self, key: str) -> None:
        if (kept := self._kept.pop(key, None)) is not None:
            self._bytes -= len(kept[1].answer or b"")


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
PAUSE_S = 0.5
"""Between two tries to forget what could not be forgotten because Redis was away."""
HASH = 64
"""Characters of a request's hash, with which every value begins; what follows is the answer, if there is one."""


class RedisIdempotencyStore:
    """``keep`` and ``running`` in seconds, as in ``MemoryIdempotencyStore``; what they take of Redis' memory is
    bounded by them.
    """

    def __init__(self, connection: Connection, keys: Keys, *, keep: float, running: float) -> None:
        self._redis, self._keys, self._keep, self._running = connection, keys, ceil(keep * 1000), ceil(running * 1000)
        self._ours: dict[str, float] = {}
        """What is being worked out here, and when Redis lets go of it by itself (monotonic)."""
        self._owed: dict[str, float] = {}
        """The same of what is not, although Redis still says so."""
        self._paying: asyncio.Task[None] | None = None

    async def begin(self, key: str, request: str) -> StoredResponse | None:
        until = time.monotonic() + self._running / 1000
        known = await self._redis.script(BEGIN, [self._keys.answered(key)], [request, self._running])
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
        except Unavailable as error:
            logs.event(LOG, "answer_not_kept", reason=error.message)
            await self._forget(key, until)

    async def forget(self, key: str) -> None:
        await self._forget(key, self._ours.pop(key, 0.0))

    async def _forget(self, key: str, until: float) -> None:
        try:
            await self._redis.script(FORGET, [self._keys.answered(key)], [HASH])
        except Unavailable as error:
            logs.event(LOG, "answer_not_forgotten", reason=error.message)
            self._owed[key] = until
            if self._paying is None or self._paying.done():
                self._paying = asyncio.create_task(self._pay())

    async def _pay(self) -> None:
        """Forgets what is owed once Redis is back: until then who asks again is told that it is being worked out. What
        Redis has let go of may be somebody else's by now.
        """
        while self._owed:
            await asyncio.sleep(PAUSE_S)
            now = time.monotonic()
            self._owed = {key: until for key, until in self._owed.items() if until > now}
            owed = list(self._owed)
            try:
                if owed:
                    await self._redis.script(FORGET, [self._keys.answered(key) for key in owed], [HASH])
            except Unavailable:
                continue
            for key in owed:
                self._owed.pop(key, None)
