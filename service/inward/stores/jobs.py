"""Bulk jobs in Redis: rows in chunks, results by chunk, and a stream of chunks that any replica works off.

A chunk's results are stored, appended to the ``scores:<name>`` stream and acknowledged in one script, and only the
first time: so a job has exactly its rows, whoever died meanwhile. What is done takes the place of what was sent, so
memory does not grow twice. A chunk says how many replicas it was given to, so that one that ends them can be given up.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
import zlib
from collections.abc import AsyncIterable, AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

from inward import logs
from inward.errors import InvalidField, NotFound, Unavailable
from inward.stores.connection import RETRY_AFTER_S, Arg, Connection, GroupLost
from inward.stores.keys import Keys
from inward.stores.score_streams import MOST_SCORES

LOG = logs.logger("stores")
GROUP = "replicas"
ROWS = 64
"""Rows of a chunk."""
UPLOAD_S = 600
"""Without a sign of life after which an upload whose process ended is forgotten."""
RENEW_S = 60.0
"""Between two signs of life of an upload, which may come as slowly as it likes."""
BLOCK_MS = 1000
"""Of one wait for a chunk."""

STORE = """
-- KEYS: rows.  ARGV: chunk, its rows, seconds to keep.
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('EXPIRE', KEYS[1], ARGV[3])
"""

RENEW = """
-- KEYS: job, rows.  ARGV: seconds to keep.  A job that was started meanwhile keeps its rows for longer.
if redis.call('EXISTS', KEYS[1]) == 0 then redis.call('EXPIRE', KEYS[2], ARGV[1]) end
"""

FINISH = """
-- KEYS: job, rows, results, chunks, scores.
-- ARGV: group, entry, chunk, results, most scores, seconds to keep, then rows for the scores.
redis.call('XACK', KEYS[4], ARGV[1], ARGV[2])
redis.call('XDEL', KEYS[4], ARGV[2])
redis.call('HDEL', KEYS[2], ARGV[3])
if redis.call('HGET', KEYS[1], 'state') ~= 'running' then return 0 end
if redis.call('HSETNX', KEYS[3], ARGV[3], ARGV[4]) == 0 then return 0 end
for i = 7, #ARGV do redis.call('XADD', KEYS[5], 'MAXLEN', '~', ARGV[5], '*', 'row', ARGV[i]) end
redis.call('EXPIRE', KEYS[3], ARGV[6])
redis.call('EXPIRE', KEYS[5], ARGV[6])
if redis.call('HLEN', KEYS[3]) == tonumber(redis.call('HGET', KEYS[1], 'chunks')) then
  redis.call('HSET', KEYS[1], 'state', 'done')
end
return 1
"""

START = """
-- KEYS: job, rows, chunks.  ARGV: job, number of chunks, seconds to keep, then names and values of its fields.
-- Gives 0, and drops the rows, where some of them are not there any more. Redis may be sent this twice.
if redis.call('EXISTS', KEYS[1]) == 1 then return 1 end
if redis.call('HLEN', KEYS[2]) ~= tonumber(ARGV[2]) then
  redis.call('DEL', KEYS[2])
  return 0
end
for number = 0, ARGV[2] - 1 do redis.call('XADD', KEYS[3], '*', 'job', ARGV[1], 'chunk', number) end
redis.call('HSET', KEYS[1], unpack(ARGV, 4))
redis.call('EXPIRE', KEYS[1], ARGV[3])
redis.call('EXPIRE', KEYS[2], ARGV[3])
redis.call('EXPIRE', KEYS[3], ARGV[3])
return 1
"""

DONE = """
-- KEYS: results.  ARGV: the last chunk, rows of a chunk, rows of the last one.  Gives how many rows are done.
local done = redis.call('HLEN', KEYS[1]) * ARGV[2]
return done - redis.call('HEXISTS', KEYS[1], ARGV[1]) * (ARGV[2] - ARGV[3])
"""

DELIVERIES = """
-- KEYS: chunks.  ARGV: group, entry.  Gives how many replicas it was given to; 1 where it was finished meanwhile.
local pending = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[2], ARGV[2], 1)[1]
return pending and pending[4] or 1
"""

CANCEL = """
-- KEYS: job, rows, results.
if redis.call('HGET', KEYS[1], 'state') == 'running' then
  redis.call('HSET', KEYS[1], 'state', 'cancelled')
  redis.call('DEL', KEYS[2], KEYS[3])
end
"""


@dataclass(frozen=True, slots=True)
class BulkJob:
    """What a bulk job is and how far it is. ``state``: ``running``, ``done`` or ``cancelled``."""

    id: str
    state: str
    kind: str
    rows: int
    done: int
    created: float
    head: str | None = None
    scores: str | None = None
    """Name of the stream to which scored rows are appended as well."""
    caller: str | None = None
    """Name of the key that it came with."""

    def body(self) -> dict[str, Any]:
        """As JSON."""
        return {name: value for name, value in asdict(self).items() if name != "caller"}


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some rows of a job, claimed by a replica."""

    entry: str
    job: BulkJob
    number: int
    deliveries: int
    """How many replicas it was given to; those before this one ended while they had it."""
    rows: tuple[str, ...]

    @property
    def size(self) -> int:
        """How many rows it has."""
        return min(ROWS, self.job.rows - ROWS * self.number)


class BulkStore:
    """See the module. A Redis that is away or full is ``Unavailable``.

    Args:
        keep: seconds after which a job and its results are forgotten.
        idle: seconds without renewal after which a chunk may be taken over.
    """

    def __init__(self, connection: Connection, keys: Keys, *, keep: float, idle: float) -> None:
        self._redis, self._keys, self._keep, self._idle = connection, keys, ceil(keep), ceil(idle * 1000)

    async def create(
        self,
        kind: str,
        lines: AsyncIterable[str],
        *,
        head: str | None,
        scores: str | None,
        caller: str | None = None,
    ) -> BulkJob:
        """Stores the rows chunk by chunk, as they come; they are worked off once all are there.

        Raises:
            InvalidField: there are none.
            Unavailable: Redis has lost some of them meanwhile.
            Exception: what ``lines`` raises; nothing is left behind, also where this process ends in the middle.
        """
        job_id = uuid.uuid4().hex
        job, rows = self._keys.bulk(job_id), self._keys.bulk(job_id, "rows")
        renewing = asyncio.create_task(self._keep_open(job, rows))
        try:
            number, chunks = await self._store(rows, lines)
        except BaseException:
            await self._discard(rows)
            raise
        finally:
            renewing.cancel()
        described: dict[str, Arg] = {
            "state": "running",
            "kind": kind,
            "rows": number,
            "chunks": chunks,
            "created": time.time(),
        }
        more = {"head": head, "scores": scores, "caller": caller}
        described |= {name: value for name, value in more.items() if value is not None}
        fields = [part for pair in described.items() for part in pair]
        keys = [job, rows, self._keys.chunks]
        if not await self._redis.script(START, keys, [job_id, chunks, self._keep, *fields]):
            logs.event(LOG, "upload_lost", severity=logging.ERROR, job=job_id, chunks=chunks)
            raise Unavailable("Redis has lost rows of this upload; send it again", retry_after=RETRY_AFTER_S)
        return await self.get(job_id)

    async def _keep_open(self, job: str, rows: str) -> None:
        while True:
            await asyncio.sleep(RENEW_S)
            try:
                await self._redis.script(RENEW, [job, rows], [UPLOAD_S])
            except Unavailable as error:  # the next one may come in time; else START finds that rows are missing
                logs.event(LOG, "upload_not_renewed", reason=error.message)

    async def _store(self, key: str, lines: AsyncIterable[str]) -> tuple[int, int]:
        """Rows and chunks."""
        rows = chunks = 0
        chunk: list[str] = []

        async def store() -> None:
            await self._redis.script(STORE, [key], [chunks, zlib.compress("\n".join(chunk).encode()), UPLOAD_S])

        async for line in lines:
            chunk.append(line)
            if len(chunk) == ROWS:
                await store()
                rows, chunks, chunk = rows + ROWS, chunks + 1, []
        if chunk:
            await store()
            rows, chunks = rows + len(chunk), chunks + 1
        if not rows:
            raise InvalidField("the body has no rows; send one JSON object a line")
        return rows, chunks

    async def _discard(self, key: str) -> None:
        try:
            await self._redis("DEL", key)
        except Unavailable:  # it expires by itself
            logs.event(LOG, "upload_not_discarded")

    async def get(self, job_id: str) -> BulkJob:
        """How far it is.

        Raises:
            NotFound: there is no such job, or not any more.
        """
        flat = await self._redis("HGETALL", self._keys.bulk(job_id))
        fields = {name.decode(): value.decode() for name, value in _pairs(flat)}
        if "state" not in fields:
            raise NotFound(f"there is no job {job_id}, or not any more", param="id")
        rows = done = int(fields["rows"])
        if fields["state"] != "done":
            last = (rows - 1) // ROWS
            args = [last, ROWS, rows - ROWS * last]
            done = int(await self._redis.script(DONE, [self._keys.bulk(job_id, "results")], args))
        return BulkJob(
            job_id,
            fields["state"],
            fields["kind"],
            rows,
            done,
            float(fields["created"]),
            fields.get("head"),
            fields.get("scores"),
            fields.get("caller"),
        )

    async def cancel(self, job_id: str) -> BulkJob:
        """Nothing more of it is computed; what was done is dropped. A job that is done stays so.

        Raises:
            NotFound: there is no such job.
        """
        await self.get(job_id)
        keys = [self._keys.bulk(job_id), self._keys.bulk(job_id, "rows"), self._keys.bulk(job_id, "results")]
        await self._redis.script(CANCEL, keys, [])
        return await self.get(job_id)

    async def results(self, job_id: str) -> AsyncIterator[str]:
        """The results, one JSON object a row, in the order of the rows."""
        rows = (await self.get(job_id)).rows
        for number in range(-(-rows // ROWS)):
            data = await self._redis("HGET", self._keys.bulk(job_id, "results"), number)
            if data is None:
                raise NotFound(f"the results of job {job_id} were forgotten meanwhile", param="id")
            yield zlib.decompress(data).decode() + "\n"

    async def take(self, replica: str) -> Chunk | None:
        """The next chunk, or one of a replica that is gone; None if none came within a second. Those of jobs that
        ended are dropped.
        """
        try:
            _, claimed, *_ = await self._redis(
                "XAUTOCLAIM", self._keys.chunks, GROUP, replica, self._idle, "0", "COUNT", 1
            )
            if not claimed:
                command = ("XREADGROUP", "GROUP", GROUP, replica, "COUNT", 1, "BLOCK", self._redis.block_ms(BLOCK_MS))
                found = await self._redis(*command, "STREAMS", self._keys.chunks, ">")
                claimed = found[0][1] if found else []
        except GroupLost:
            await self._redis.ensure_group(self._keys.chunks, GROUP)
            return None
        for entry, fields in claimed:
            if (chunk := await self._chunk(entry.decode(), dict(_pairs(fields or ())))) is not None:
                return chunk
            await self._redis("XACK", self._keys.chunks, GROUP, entry)
            await self._redis("XDEL", self._keys.chunks, entry)
        return None

    async def renew(self, replica: str, entry: str) -> None:
        """A sign of life for a chunk. One that somebody else took over meanwhile is done twice, and stored once."""
        await self._redis("XCLAIM", self._keys.chunks, GROUP, replica, 0, entry, "JUSTID")

    async def give_back(self, replica: str, chunk: Chunk) -> None:
        """Another replica may take it at once, as if this one had never had it. A store that is away learns of it by
        the silence.
        """
        aged = ("IDLE", self._idle, "RETRYCOUNT", chunk.deliveries - 1, "JUSTID")
        with suppress(Unavailable):
            await self._redis("XCLAIM", self._keys.chunks, GROUP, replica, 0, chunk.entry, *aged)

    async def finish(
        self, chunk: Chunk, results: Sequence[Mapping[str, Any]], scored: Sequence[Mapping[str, Any]]
    ) -> None:
        """Stores the results of a chunk, and appends ``scored`` to the job's stream if it has one; the first time
        only.
        """
        job = chunk.job
        own = (self._keys.bulk(job.id), self._keys.bulk(job.id, "rows"), self._keys.bulk(job.id, "results"))
        keys = [*own, self._keys.chunks, self._keys.scores(job.scores or "-")]
        data = zlib.compress("\n".join(json.dumps(row) for row in results).encode())
        rows = [json.dumps(row) for row in scored] if job.scores else []
        await self._redis.script(FINISH, keys, [GROUP, chunk.entry, chunk.number, data, MOST_SCORES, self._keep, *rows])

    async def _chunk(self, entry: str, fields: Mapping[bytes, bytes]) -> Chunk | None:
        try:
            job, number = await self.get(fields[b"job"].decode()), int(fields[b"chunk"])
        except (NotFound, KeyError, ValueError):
            return None
        if job.state != "running":
            return None
        data = await self._redis("HGET", self._keys.bulk(job.id, "rows"), number)
        if data is None and await self._redis("HEXISTS", self._keys.bulk(job.id, "results"), number):
            return None  # another replica was faster
        deliveries = await self._redis.script(DELIVERIES, [self._keys.chunks], [GROUP, entry])
        chunk = Chunk(entry, job, number, int(deliveries), ())
        try:
            rows = zlib.decompress(data or b"").decode().split("\n")  # none if Redis has lost it, which is unreadable
        except (zlib.error, UnicodeDecodeError) as error:  # each is an error then, and the job ends
            logs.event(LOG, "chunk_unreadable", severity=logging.ERROR, error=error, job=job.id, chunk=number)
            rows = [""] * chunk.size
        return replace(chunk, rows=tuple(rows))


def _pairs(reply: Any) -> list[tuple[bytes, bytes]]:
    """Name and value, whichever way the client gives them."""
    return list(reply.items()) if isinstance(reply, dict) else list(zip(reply[::2], reply[1::2], strict=True))
