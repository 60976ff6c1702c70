"""Server-sent events: an answer that is sent piece by piece, and says so when something goes wrong on the way."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from inward import logs
from inward.errors import InternalError, InwardError

LOG = logs.logger("api")
HEARTBEAT_S = 15.0
"""Seconds of silence after which a comment is sent, so that nobody between takes the connection for dead."""
DONE = "data: [DONE]\n\n"
"""The end, as clients of streaming language models know it."""
EVENTS: dict[str, Any] = {
    "content": {"text/event-stream": {"schema": {"type": "string", "description": "With `stream`."}}}
}
"""Of routes that may answer so, for the OpenAPI document."""


def event(name: str, body: BaseModel | dict[str, Any]) -> str:
    """One event with JSON in ASCII, so that no text can end it early."""
    return f"event: {name}\n{data(body)}"


def data(body: BaseModel | dict[str, Any]) -> str:
    """An event without a name."""
    value = body if isinstance(body, dict) else body.model_dump(mode="json")
    return f"data: {json.dumps(value, allow_nan=False)}\n\n"


class EventStream(Response):
    """Status 200, then ``events`` as they come, then ``[DONE]``. What ``events`` raises is sent as an event ``error``
    before it.

    Cancelling (the caller hung up) closes ``events``.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def give(text: str, *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": text.encode(), "more_body": more})

        coming: asyncio.Task[str | None] | None = None
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            while True:
                coming = coming or asyncio.create_task(self._next())
                if not (await asyncio.wait({coming}, timeout=HEARTBEAT_S))[0]:
                    await give(": still there\n\n")
                    continue
                text, coming = coming.result(), None
                if text is None:
                    break
                await give(text)
            await give(DONE, more=False)
        finally:
            if coming is not None:
                coming.cancel()
                await asyncio.gather(coming, return_exceptions=True)
            await self._events.aclose()

    async def _next(self) -> str | None:
        try:
            return await anext(self._events, None)
        except InwardError as error:
            return event("error", error.body())
        except Exception as error:
            logs.event(LOG, "stream_failed", severity=logging.ERROR, error=error)
            return event("error", InternalError("a defect of the server ended this stream").body())
