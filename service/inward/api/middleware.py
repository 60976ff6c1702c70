"""What every request passes on its way in and out: the record of it, HEAD, and its body.

Plain ASGI, because Starlette's ``BaseHTTPMiddleware`` hides ``http.disconnect`` from what is inside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
import uuid
from collections.abc import Mapping, Set
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inward import logs, metrics, tracing
from inward.api.answers import refusal
from inward.api.auth import HEALTH, Caller
from inward.errors import InternalError, TooLarge, TooSlow, UnknownEncoding

LOG, AUDIT = logs.logger("api"), logs.logger("audit")
REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE"})
HUNG_UP = 499
"""Code in metrics and logs (nginx's) of a request whose caller left before the answer."""
PLAIN = frozenset({"", "identity"})
"""Values of ``content-encoding`` that say that a body is what it is."""
UNTRACED = HEALTH | {"/metrics"}
"""Asked every few seconds, by machines."""


class AccessLog:
    """Outermost: request id, ``x-total-time``, metrics, one event and one span per request; a defect becomes a 500 in
    the error shape.

    Where callers have keys, one event ``audit`` says which of them asked for how many tokens, or for what not every key
    may do; it is written whatever the log level is.

    The label ``route`` is the route's template, and ``other`` where the path is none of ours. What machines ask every
    few seconds is told of where its answer is another than the last time: a probe is red, and is green again.
    """

    def __init__(self, app: ASGIApp, *, paths: Set[str]) -> None:
        self.app = app
        self._paths = paths
        self._probed: dict[str, int] = {}  # last status, by path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif scope["path"] in UNTRACED:
            await self._record(scope, receive, send)
        else:
            with tracing.request(Headers(scope=scope)) as span:
                await self._record(scope, receive, send, span)

    async def _record(self, scope: Scope, receive: Receive, send: Send, span: tracing.Span | None = None) -> None:
        started = time.perf_counter()
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        code = HUNG_UP

        async def record(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["x-total-time"] = f"{1000 * (time.perf_counter() - started):.2f}"
            await send(message)

        metrics.REQUESTS_IN_FLIGHT.inc()
        try:
            await self.app(scope, receive, record)
        except Exception:
            # type and place, not the message
            LOG.exception("request_failed", extra={"fields": {"request_id": request_id}})
            if code == HUNG_UP:
                defect = InternalError(f"a defect of the server; its log has more under {request_id}")
                await refusal(defect)(scope, receive, record)
        finally:
            metrics.REQUESTS_IN_FLIGHT.dec()
            seconds = time.perf_counter() - started
            route = self._route(scope)
            metrics.REQUESTS_TOTAL.labels(route=route, code=str(code)).inc()
            metrics.REQUEST_SECONDS.labels(route=route).observe(seconds)
            severity = self._severity(scope["path"], code)
            ms = round(1000 * seconds, 2)
            method = scope["method"] if scope["method"] in METHODS else "other"  # a caller may send any word
            ids: dict[str, Any] = {"request_id": request_id}
            ids |= tracing.answered(span, method=method, route=route, code=code)
            logs.event(LOG, "request", severity=severity, method=method, route=route, code=code, ms=ms, **ids)
            if (caller := scope.get("caller")) is not None:
                _audit(caller, method=method, route=route, code=code, request_id=request_id)

    def _severity(self, path: str, code: int) -> int:
        """Of the event of a request that was answered so."""
        if path in UNTRACED:
            last, self._probed[path] = self._probed.get(path, 200), code
            if code == last:
                return logging.DEBUG
        return logging.WARNING if code >= 500 else logging.INFO

    def _route(self, scope: Scope) -> str:
        path = str(getattr(scope.get("route"), "path", scope["path"]))
        return path if path in self._paths else "other"


def _audit(caller: Caller, **request: Any) -> None:
    metrics.KEY_REQUESTS_TOTAL.labels(key=caller.name, code=str(request["code"])).inc()
    if caller.tokens or caller.restricted:
        logs.event(AUDIT, "audit", key=caller.name, tokens=caller.tokens, **request)


class HeadAsGet:
    """Answers HEAD as GET, without the body, on every route that has GET."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        get = {**scope, "method": "GET"}
        try:
            await self.app(get, receive, send_head)
        finally:
            if "route" in get:  # for the access log
                scope["route"] = get["route"]


class RequestBody:
    """Takes a body of at most ``limit`` bytes, whatever its declared length, and cancels the work when the caller hangs
    up.

    It must come within ``seconds``, so that nobody holds a connection by sending a byte now and then. ``uploads`` are
    paths with a limit of their own, whose bodies are handed on as they come, however slowly.
    """

    def __init__(
        self, app: ASGIApp, *, limit: int, seconds: float = 60.0, uploads: Mapping[str, int] | None = None
    ) -> None:
        self.app = app
        self._limit, self._seconds = limit, seconds
        self._uploads = uploads or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if (encoding := Headers(scope=scope).get("content-encoding", "identity").strip().lower()) not in PLAIN:
            unknown = UnknownEncoding(
                f"a body with content-encoding {encoding[:32]!r} is not taken; send it as it is, uncompressed",
                param="content-encoding",
            )
            await refusal(unknown, headers={"accept-encoding": "identity"})(scope, receive, send)
            return
        if scope["path"] in self._uploads:
            await self._upload(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._seconds):
                body = await self._body(scope, receive)
        except TimeoutError:
            slow = TooSlow(f"the body did not come within {self._seconds:g} s")
            await refusal(slow, headers={"connection": "close"})(scope, receive, send)
            return
        except TooLarge as error:
            await refusal(error)(scope, receive, send)
            return
        if body is None:
            return
        gone = asyncio.create_task(_hang_up(receive))
        work = asyncio.ensure_future(self.app(scope, _replay(body, gone), send))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            gone.cancel()
            if not work.done():
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)

    async def _upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        limit = self._uploads[scope["path"]]
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > limit:
                raise _too_large(limit)
            return message

        if _declared(scope) > limit:
            await refusal(_too_large(limit))(scope, receive, send)
            return
        with contextlib.suppress(ClientDisconnect):  # in the middle of the body: nobody is there to be told
            await self.app(scope, counted, send)

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """All of the body; None if the caller left meanwhile.

        Raises:
            TooLarge: more than the limit is declared, or comes; no more than that and one chunk is read.
        """
        too_large = _too_large(self._limit)
        if _declared(scope) > self._limit:
            raise too_large
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > self._limit:
                raise too_large
            if not message.get("more_body", False):
                return b"".join(chunks)


def _declared(scope: Scope) -> int:
    return int(Headers(scope=scope).get("content-length", "0"))


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body is larger than {limit} bytes; send fewer items in one request")


async def _hang_up(receive: Receive) -> None:
    """Returns when the connection is closed by the other side."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _replay(body: bytes, gone: asyncio.Task[None]) -> Receive:
    """What the app receives: the whole body at once, then nothing until the caller hangs up."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await asyncio.wait({gone})
        return {"type": "http.disconnect"}

    return receive
