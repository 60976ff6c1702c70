"""Works off bulk jobs: every API replica takes chunks and sends them through the same routes as everybody's requests,
but as bulk.

So a row of a bulk job gets what the same row gets in a request, and interactive requests go first.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Sequence
from typing import Any

import httpx
from starlette.types import ASGIApp

from inward import logs
from inward.errors import InvalidField, Unavailable
from inward.stores.jobs import ROWS, BulkStore, Chunk

LOG = logs.logger("api")
RESULTS = {"margin": "margins", "score": "scores", "reward": "rewards"}
"""The kinds of job, which are routes, and the list in the answer of each."""
AT_ONCE = 2
"""Chunks in flight in one replica, so that workers find the next one waiting."""


class BulkRunner:
    """See the module.

    Args:
        app: the routes, without keys, on an intake that sends with priority ``bulk``.
        idle: the store's; chunks are renewed at a third of it.
    """

    def __init__(self, store: BulkStore, app: ASGIApp, *, idle: float) -> None:
        self._store, self._idle = store, idle
        self._replica = uuid.uuid4().hex
        self._client = httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://bulk", timeout=None)

    async def run(self) -> None:
        """Until it is cancelled; a chunk that is cut off is taken over by another replica."""
        async with self._client, asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(self._work())

    async def _work(self) -> None:
        while True:
            try:
                if (chunk := await self._store.take(self._replica)) is not None:
                    await self._do(chunk)
            except Unavailable as error:
                logs.event(LOG, "bulk_waits", reason=error.message)
                await asyncio.sleep(1.0)

    async def _do(self, chunk: Chunk) -> None:
        renewing = asyncio.create_task(self._renew(chunk))
        try:
            rows = [_parsed(line) for line in chunk.rows]
            results = await self._results(chunk, rows)
        finally:
            renewing.cancel()
        numbered = [{"index": chunk.number * ROWS + i, **result} for i, result in enumerate(results)]
        scored = [
            {**row, **result}
            for row, result in zip(rows, numbered, strict=True)
            if isinstance(row, dict) and not result.get("error")
        ]
        await self._store.finish(chunk, numbered, scored)

    async def _renew(self, chunk: Chunk) -> None:
        while True:
            await asyncio.sleep(self._idle / 3)
            await self._store.renew(self._replica, chunk.entry)

    async def _results(self, chunk: Chunk, rows: Sequence[Any]) -> list[dict[str, Any]]:
        """What the route says of all rows together; where it refuses them because of one, of each alone."""
        if all(isinstance(row, dict) for row in rows):
            answer = await self._asked(chunk, rows)
            if isinstance(answer, list):
                return answer
            if len(rows) == 1:
                return [{"error": answer}]
        return [await self._alone(chunk, row) for row in rows]

    async def _alone(self, chunk: Chunk, row: Any) -> dict[str, Any]:
        if not isinstance(row, dict):
            return {"error": InvalidField("this row is not a JSON object").body()["error"]}
        answer = await self._asked(chunk, [row])
        return answer[0] if isinstance(answer, list) else {"error": answer}

    async def _asked(self, chunk: Chunk, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]] | dict[str, Any]:
        """Results, or the error. What may be otherwise later (503, 504) is asked again later."""
        body: dict[str, Any] = {"pairs" if "chosen" in rows[0] else "items": rows}
        if chunk.job.head:
            body["head"] = chunk.job.head
        while True:
            answer = await self._client.post(f"/{chunk.job.kind}", json=body)
            if answer.status_code in (503, 504):
                await asyncio.sleep(min(30.0, float(answer.headers.get("retry-after", 1))))
                continue
            content = answer.json()
            if answer.status_code != 200:
                return dict(content["error"])
            named = {name: content[name] for name in ("head", "policy_version")}
            return [{**result, **named} for result in content[RESULTS[chunk.job.kind]]]


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
