"""Works off bulk jobs: every API replica takes chunks and scores their rows as rows of a request are scored, behind
everybody's requests.

Whatever happens, a chunk ends: what is wrong with a row becomes that row's error; rows that take longer than a request
may are done in halves, and one that is too slow by itself has an error; a chunk that ends replicas is given up.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Sequence
from typing import Any, cast

from inward import logs
from inward.api.auth import CALLER, Caller
from inward.api.rows import Row, RowAnswer, RowsKind, failed, parse, score_rows
from inward.api.services import Services
from inward.errors import DeadlineExceeded, InternalError, InwardError, Unavailable
from inward.stores.jobs import ROWS, BulkStore, Chunk

LOG, AUDIT = logs.logger("api"), logs.logger("audit")
LONGEST_WAIT_S = 30.0
"""Between two tries while the service has no room, whatever it says."""
TRIES = 3
"""Of a row that is not done before the deadline, by itself; it may only have waited behind others."""
AWAY_S = 1.0
"""Between two looks for chunks while their store can't be reached."""


class BulkRunner:
    """See the module.

    Args:
        services: whose intake sends with priority ``bulk``.
        idle: the store's; chunks are renewed at a third of it.
        max_deliveries: replicas that a chunk may end before it is given up.
    """

    def __init__(self, store: BulkStore, services: Services, *, idle: float, max_deliveries: int = 3) -> None:
        self._store, self._services, self._idle, self._max_deliveries = store, services, idle, max_deliveries
        self._replica = uuid.uuid4().hex

    async def run(self) -> None:
        """One chunk after the other, until it is cancelled; what it has then is given back."""
        while True:
            try:
                if (chunk := await self._store.take(self._replica)) is not None:
                    await self._do(chunk)
            except Unavailable as error:
                # the queue tells of it once
                logs.event(LOG, "bulk_waits", severity=logging.DEBUG, reason=error.message)
                await asyncio.sleep(AWAY_S)

    async def _do(self, chunk: Chunk) -> None:
        renewing = asyncio.create_task(self._renew(chunk))
        caller = None if chunk.job.caller is None else Caller(chunk.job.caller)
        token = CALLER.set(caller)
        try:
            rows, answers = await self._answers(chunk)
            await self._finish(chunk, rows, answers)
        except asyncio.CancelledError:
            await self._store.give_back(self._replica, chunk)
            raise
        finally:
            CALLER.reset(token)
            renewing.cancel()
            if caller is not None and caller.tokens:
                logs.event(AUDIT, "audit", key=caller.name, tokens=caller.tokens, job=chunk.job.id, chunk=chunk.number)

    async def _answers(self, chunk: Chunk) -> tuple[Sequence[Row | InwardError], Sequence[RowAnswer]]:
        if chunk.deliveries > self._max_deliveries:
            logs.event(LOG, "chunk_given_up", severity=logging.ERROR, job=chunk.job.id, chunk=chunk.number)
            problem = InternalError(f"{chunk.deliveries - 1} replicas ended while they had this row or one beside it")
            return [problem] * chunk.size, [failed(problem)] * chunk.size
        rows = [parse(line) for line in chunk.rows]
        return rows, await self._scored(chunk, rows)

    async def _finish(self, chunk: Chunk, rows: Sequence[Row | InwardError], answers: Sequence[RowAnswer]) -> None:
        """Results by row; rows that were scored, with their scores, for the job's stream."""
        results: list[dict[str, Any]] = [
            {"index": chunk.number * ROWS + i, **answer.body()} for i, answer in enumerate(answers)
        ]
        scored = [
            {**row, **result}
            for row, result, answer in zip(rows, results, answers, strict=True)
            if answer.error is None and not isinstance(row, InwardError)
        ]
        await self._store.finish(chunk, results, scored)

    async def _scored(self, chunk: Chunk, rows: Sequence[Row | InwardError], tries: int = TRIES) -> Sequence[RowAnswer]:
        """What becomes of these rows together; where that fails because of one of them, of each half."""
        try:
            return await self._when_there_is_room(chunk, rows)
        except DeadlineExceeded as error:
            if len(rows) == 1 and tries > 1:
                return await self._scored(chunk, rows, tries - 1)
            problem: InwardError = error
        except InwardError as error:  # it is so for all of them: the head is gone
            return [failed(error)] * len(rows)
        except Exception as error:
            logs.event(LOG, "rows_failed", severity=logging.ERROR, error=error, job=chunk.job.id, rows=len(rows))
            problem = InternalError(f"this row could not be scored ({type(error).__name__})")
        if len(rows) == 1:
            return [failed(problem)]
        middle = len(rows) // 2
        return [*await self._scored(chunk, rows[:middle]), *await self._scored(chunk, rows[middle:])]

    async def _when_there_is_room(self, chunk: Chunk, rows: Sequence[Row | InwardError]) -> Sequence[RowAnswer]:
        kind = cast(RowsKind, chunk.job.kind)
        while True:
            try:
                return await score_rows(self._services, kind, rows, head=chunk.job.head)
            except Unavailable as error:  # it may be otherwise later
                await asyncio.sleep(min(LONGEST_WAIT_S, error.retry_after or AWAY_S))

    async def _renew(self, chunk: Chunk) -> None:
        while True:
            await asyncio.sleep(self._idle / 3)
            try:
                await self._store.renew(self._replica, chunk.entry)
            except Unavailable as error:  # the next one may come in time; else it is done twice and stored once
                logs.event(LOG, "chunk_not_renewed", reason=error.message)
