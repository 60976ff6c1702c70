"""What replicas and workers say to each other beside the jobs: who is there, requests to one worker, news to all."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from redis.exceptions import RedisError, ResponseError

from inward.errors import DeadlineExceeded
from inward.stores.connection import Connection, unavailable
from inward.stores.keys import GROUP, Keys

MOST_REQUESTS = 1000
BLOCK = 1000
"""Milliseconds of one wait; a wait is repeated until there is something."""


class ControlChannel:
    """Requests are done by one worker, whichever is free, at most once; news reach every worker that is there."""

    def __init__(self, connection: Connection, keys: Keys) -> None:
        self._redis, self._keys = connection, keys

    async def workers(self) -> dict[str, bytes]:
        """What each worker that is alive says of itself.

        Raises:
            RedisError: Redis is away.
        """
        seconds, micros = await self._redis("TIME")
        now = int(seconds) * 1000 + int(micros) // 1000
        workers = [name.decode() for name in await self._redis("ZRANGEBYSCORE", self._keys.workers, now, "+inf")]
        infos = await self._redis("MGET", *(self._keys.worker(name) for name in workers)) if workers else []
        return {name: info for name, info in zip(workers, infos, strict=True) if info}

    async def ask(self, request: bytes, timeout: float) -> bytes:
        """Has one worker do ``request`` and gives its answer.

        Raises:
            Unavailable: Redis is away or full.
            DeadlineExceeded: no worker answered within ``timeout`` seconds; whether it was done is not known.
        """
        key, until = self._keys.key("answer", uuid.uuid4().hex), time.time() + timeout
        try:
            fields = ("answer", key, "until", until, "request", request)
            await self._redis("XADD", self._keys.requests, "MAXLEN", "~", MOST_REQUESTS, "*", *fields)
            while (left := until - time.time()) > 0:
                if found := await self._redis("BLPOP", key, min(left, 1.0)):
                    return bytes(found[1])
        except (RedisError, OSError) as error:
            raise unavailable(error) from error
        raise DeadlineExceeded(
            f"no worker answered within {timeout:g} s; ask again: what was done already is not done twice"
        )

    async def next_request(self, worker: str) -> tuple[str, bytes]:
        """Waits for a request that somebody still waits for: where the answer goes, and the request.

        Raises:
            RedisError: Redis is away.
        """
        command = (
            "XREADGROUP",
            "GROUP",
            GROUP,
            worker,
            "COUNT",
            1,
            "BLOCK",
            BLOCK,
            "NOACK",
            "STREAMS",
            self._keys.requests,
            ">",
        )
        while True:
            try:
                found = await self._redis(*command)
            except ResponseError as error:
                if "NOGROUP" not in str(error):
                    raise
                await self._join()
                continue
            for _, fields in found[0][1] if found else ():
                await self._redis("XTRIM", self._keys.requests, "MAXLEN", "~", MOST_REQUESTS)
                if float(fields[b"until"]) > time.time():
                    return fields[b"answer"].decode(), fields[b"request"]

    async def answer(self, key: str, answer: bytes) -> None:
        """Sends the answer; it is kept for a minute."""
        await self._redis("RPUSH", key, answer)
        await self._redis("EXPIRE", key, 60)

    @asynccontextmanager
    async def alone(self, worker: str, seconds: float) -> AsyncIterator[None]:
        """No other worker is in here at the same time, for at most ``seconds``: changes of the heads folder are made
        one by one.
        """
        key = self._keys.key("lock")
        while not await self._redis("SET", key, worker, "NX", "PX", round(seconds * 1000)):  # noqa: ASYNC110 (it crosses processes)
            await asyncio.sleep(0.05)
        try:
            yield
        finally:
            if await self._redis("GET", key) == worker.encode():
                await self._redis("DEL", key)

    async def policy(self, first: bytes) -> bytes:
        """What was remembered of the policy last; ``first`` where nothing is, which is remembered then."""
        await self._redis("SET", self._keys.policy, first, "NX")
        return bytes(await self._redis("GET", self._keys.policy) or first)

    async def remember_policy(self, history: bytes) -> None:
        """For all workers, also those to come."""
        await self._redis("SET", self._keys.policy, history)

    async def announce(self, news: bytes) -> None:
        """Tells all workers."""
        await self._redis("XADD", self._keys.news, "MAXLEN", "~", MOST_REQUESTS, "*", "news", news)

    async def next_news(self, after: str) -> tuple[str, bytes | None]:
        """Waits a second for the next news after ``after`` (``$``: from now on), and gives them with their place, or
        None.
        """
        found = await self._redis("XREAD", "COUNT", 1, "BLOCK", BLOCK, "STREAMS", self._keys.news, after)
        if not found:
            return after, None
        place, fields = found[0][1][0]
        return place.decode(), fields[b"news"]

    async def latest_news(self) -> str:
        """The place after which news are still to come."""
        found = await self._redis("XREVRANGE", self._keys.news, "+", "-", "COUNT", 1)
        return str(found[0][0].decode()) if found else "0"

    async def _join(self) -> None:
        try:
            await self._redis("XGROUP", "CREATE", self._keys.requests, GROUP, "0", "MKSTREAM")
        except ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise
            await asyncio.sleep(0.05)
