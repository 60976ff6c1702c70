"""What replicas and workers say to each other beside the jobs: who is there, requests to one worker, news to all."""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from inward import logs
from inward.errors import Unavailable
from inward.stores.connection import Connection, GroupLost
from inward.stores.keys import FORGOTTEN_S, GROUP, Keys

LOG = logs.logger("control")
MOST_NEWS = 100
"""Kept; a worker that missed some reads everything."""
BLOCK_MS = 1000
"""Of one wait; a wait is repeated until there is something."""
ASK_AGAIN_S = 1.0
"""After a request that no worker has answered."""
SHORTEST_S = 0.01
"""Of one wait for an answer: Redis counts milliseconds, and takes none for no end."""
ANSWER_S = 60
"""For which an answer that nobody fetches is kept."""
STALE_S = 300
"""After which a request that no worker took is forgotten; nobody waits for it any more by then."""
RENEWALS = 3
"""Of the lock, in the time for which it is held without one."""

ALIVE = """
-- KEYS: workers.  Gives those that are alive.
local now = redis.call('TIME')
return redis.call('ZRANGEBYSCORE', KEYS[1], now[1] * 1000 + math.floor(now[2] / 1000), '+inf')
"""
ASK = """
-- KEYS: requests.  ARGV: entry before which they are stale, seconds to keep, then the fields of a request.
redis.call('XADD', KEYS[1], 'MINID', '=', ARGV[1], '*', unpack(ARGV, 3))
redis.call('EXPIRE', KEYS[1], ARGV[2])
"""
ANSWER = """
-- KEYS: answer.  ARGV: the answer, seconds to keep.
redis.call('RPUSH', KEYS[1], ARGV[1])
redis.call('EXPIRE', KEYS[1], ARGV[2])
"""
ANNOUNCE = """
-- KEYS: news.  ARGV: most news, seconds to keep, the news.
redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[1], '*', 'news', ARGV[3])
redis.call('EXPIRE', KEYS[1], ARGV[2])
"""
RENEW = """
-- KEYS: lock.  ARGV: who has it, milliseconds.  Gives 0 where it is somebody else's by now, or nobody's.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""
UNLOCK = """
-- KEYS: lock.  ARGV: who has it.
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
"""


class ControlChannel:
    """Requests are done by one worker, whichever is free, at most once; news reach every worker that is there. Raises
    ``Unavailable`` where Redis is away or full.
    """

    def __init__(self, connection: Connection, keys: Keys) -> None:
        self._redis, self._keys = connection, keys

    async def workers(self) -> dict[str, bytes]:
        """What each worker that is alive says of itself."""
        workers = [name.decode() for name in await self._redis.script(ALIVE, [self._keys.workers], [])]
        infos = await self._redis("MGET", *(self._keys.worker(name) for name in workers)) if workers else []
        return {name: info for name, info in zip(workers, infos, strict=True) if info}

    async def ask(self, request: bytes, timeout: float) -> bytes:
        """Has one worker do ``request`` and gives its answer.

        Raises:
            Unavailable: no worker answered within ``timeout`` seconds, such as one that died over it. It is safe to ask
                again.
        """
        key, now = self._keys.answer(uuid.uuid4().hex), time.time()
        until = now + timeout
        fields = ("answer", key, "until", until, "request", request)
        stale = f"{max(0, round(1000 * (now - STALE_S)))}-0"
        await self._redis.script(ASK, [self._keys.requests], [stale, STALE_S, *fields])
        while (left := until - time.time()) > 0:
            if found := await self._redis("BLPOP", key, min(max(left, SHORTEST_S), 1.0)):
                return bytes(found[1])
        raise Unavailable(
            f"no worker answered within {timeout:g} s; ask again: what was done already is not done twice",
            retry_after=ASK_AGAIN_S,
        )

    async def next_request(self, worker: str) -> tuple[str, bytes] | None:
        """Waits a moment for a request that somebody still waits for: where the answer goes, and the request. Redis
        keeps nothing of one that was taken.
        """
        stream = self._keys.requests
        command = (
            "XREADGROUP",
            "GROUP",
            GROUP,
            worker,
            "COUNT",
            1,
            "BLOCK",
            self._redis.block_ms(BLOCK_MS),
            "NOACK",
            "STREAMS",
            stream,
            ">",
        )
        try:
            found = await self._redis(*command)
        except GroupLost:
            await self._redis.ensure_group(stream, GROUP)
            return None
        if not found:
            return None
        [(entry, fields)] = found[0][1]
        await self._redis("XDEL", stream, entry)
        try:
            asked = fields[b"answer"].decode(), fields[b"request"]
            return asked if float(fields[b"until"]) > time.time() else None
        except (KeyError, ValueError) as error:
            logs.event(LOG, "request_unreadable", severity=logging.ERROR, error=error)
            return None

    async def answer(self, key: str, answer: bytes) -> None:
        """Sends the answer; it is kept for a minute."""
        await self._redis.script(ANSWER, [key], [answer, ANSWER_S])

    @asynccontextmanager
    async def alone(self, worker: str, seconds: float) -> AsyncIterator[None]:
        """No other worker is in here at the same time, however long it takes: changes of the heads folder are made one
        by one. One that dies in here is out after ``seconds``.
        """
        key, who = self._keys.lock, f"{worker} {uuid.uuid4().hex}"
        take = ("SET", key, who, "NX", "PX", math.ceil(seconds * 1000))
        while not await self._redis(*take):  # noqa: ASYNC110 (it crosses processes)
            await asyncio.sleep(0.05)
        renewing = asyncio.create_task(self._renew(who, seconds))
        try:
            yield
        finally:
            renewing.cancel()
            with suppress(Unavailable):  # it expires by itself
                await self._redis.script(UNLOCK, [key], [who])

    async def _renew(self, who: str, seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds / RENEWALS)
            with suppress(Unavailable):  # the next one may come in time
                if not await self._redis.script(RENEW, [self._keys.lock], [who, math.ceil(seconds * 1000)]):
                    logs.event(LOG, "lock_lost", severity=logging.ERROR)
                    return

    async def policy(self, first: bytes) -> bytes:
        """What was remembered of the policy last; ``first`` where nothing is, which is remembered then."""
        await self._redis("SET", self._keys.policy, first, "NX", "EX", FORGOTTEN_S)
        return bytes(await self._redis("GET", self._keys.policy) or first)

    async def remember_policy(self, history: bytes) -> None:
        """For all workers, also those to come."""
        await self._redis("SET", self._keys.policy, history, "EX", FORGOTTEN_S)

    async def announce(self, news: bytes) -> None:
        """Tells all workers."""
        await self._redis.script(ANNOUNCE, [self._keys.news], [MOST_NEWS, FORGOTTEN_S, news])

    async def next_news(self, after: str) -> tuple[str, bool]:
        """Waits a moment for news after the place ``after``: the place after them, and whether there were any."""
        found = await self._redis(
            "XREAD", "COUNT", MOST_NEWS, "BLOCK", self._redis.block_ms(BLOCK_MS), "STREAMS", self._keys.news, after
        )
        return (found[0][1][-1][0].decode(), True) if found else (after, False)

    async def latest_news(self) -> str:
        """The place after which news are still to come."""
        found = await self._redis("XREVRANGE", self._keys.news, "+", "-", "COUNT", 1)
        return str(found[0][0].decode()) if found else "0"
