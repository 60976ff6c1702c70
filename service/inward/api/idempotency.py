"""``Idempotency-Key``: who asks again with the same key and the same body gets the same answer, worked out once.

Only answers with status 200 or 201 are kept, with their headers, and no streams of events, nor answers of which a part
could not be had just now; after an error the caller may ask again. The key belongs to the credential that it came with.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections.abc import Set

import msgspec
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inward import logs
from inward.api.answers import JSON, refusal
from inward.api.auth import credential
from inward.api.body import CANDIDATES
from inward.errors import Conflict, InvalidField, InwardError, Unavailable
from inward.stores.idempotency import IdempotencyStore

KEY = re.compile(r"[\x21-\x7e]{1,255}")
HEADER = "Idempotency-Key"
GOOD = (200, 201)
REPLAYED = (b"idempotency-replayed", b"true")
HARMLESS = frozenset({"/margin", "/score", "/reward", "/v1/rerank", "/v2/rerank"})
"""Paths of which a repeat changes nothing: they are answered without the store while that is away. So is ``/rerank`` of
given candidates, whose answer is appended to no stream.
"""
RERANK = "/rerank"
PASSING = f'"{Unavailable.type}"'.encode()
"""In an answer with an element that may be scored the next time. Within a text its quotes would be escaped."""

LOG = logs.logger("api")


class KeptAnswer(msgspec.Struct, frozen=True, array_like=True):
    """An answer as it is kept."""

    asked: bytes
    """Digest of the body that it answers."""
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Idempotency:
    """Stands inside ``RequestBody``, which hands it the whole body at once and cancels it when the caller hangs up.

    ``uploads`` are paths whose bodies come in pieces: they are handed on as they come, and compared in the end.
    """

    def __init__(self, app: ASGIApp, *, store: IdempotencyStore, uploads: Set[str] = frozenset()) -> None:
        self.app = app
        self._store, self._uploads = store, uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = Headers(scope=scope).get(HEADER) if scope["type"] == "http" and scope["method"] == "POST" else None
        if given is None:
            await self.app(scope, receive, send)
            return
        try:
            await self._once(given, scope, receive, send)
        except _Refused as refused:
            await refusal(refused.error, headers=refused.headers)(scope, receive, send)

    async def _once(self, given: str, scope: Scope, receive: Receive, send: Send) -> None:
        if not KEY.fullmatch(given):
            raise _Refused(
                InvalidField(f"{HEADER} must be 1 to 255 visible ASCII characters without spaces", param=HEADER)
            )
        body = _Body(receive)
        owner = credential(Headers(scope=scope)) or b""
        key = hashlib.sha256(owner + b" " + given.encode()).hexdigest()
        request = b" ".join((scope["path"].encode(), scope["query_string"]))
        if scope["path"] not in self._uploads:
            await body.read()
            request += b" " + body.digest
        asked = hashlib.sha256(request).hexdigest()
        try:
            known = await self._store.begin(key, asked)
        except Unavailable as error:
            if scope["path"] not in HARMLESS and not (scope["path"] == RERANK and body.ranks_given):
                raise _Refused(error) from None
            logs.event(LOG, "answer_not_kept", severity=logging.DEBUG, reason=error.message)
            await self.app(scope, body.receive, send)
            return
        if known is None:
            await self._work_out(key, asked, scope, body, send)
        elif known.request != asked:
            raise _Refused(_reused())
        elif known.answer is None:
            running = Conflict(f"a request with this {HEADER} is being worked out; ask again in a second", param=HEADER)
            raise _Refused(running, {"retry-after": "1"})
        else:
            await _replay(msgspec.msgpack.decode(known.answer, type=KeptAnswer), body, scope, send)

    async def _work_out(self, key: str, asked: str, scope: Scope, body: _Body, send: Send) -> None:
        kept: KeptAnswer | None = None
        chunks: list[bytes] = []
        whole = False

        async def listen(message: Message) -> None:
            nonlocal kept, whole
            if message["type"] == "http.response.start":
                headers = [(bytes(name), bytes(value)) for name, value in message["headers"]]
                if message["status"] in GOOD and Headers(raw=headers).get("content-type") == JSON:
                    kept = KeptAnswer(b"", message["status"], headers, b"")
            elif kept is not None:
                chunks.append(message.get("body", b""))
                content = b"" if message.get("more_body", False) else b"".join(chunks)
                if content and PASSING not in content:
                    # before it is sent: who loses it on the way finds it
                    answer = KeptAnswer(body.digest, kept.status, kept.headers, content)
                    await self._store.finish(key, asked, msgspec.msgpack.encode(answer))
                    whole = True
            await send(message)

        try:
            await self.app(scope, body.receive, listen)
        finally:
            if not whole:
                await asyncio.shield(self._store.forget(key))


class _Refused(Exception):
    def __init__(self, error: InwardError, headers: dict[str, str] | None = None) -> None:
        super().__init__()
        self.error, self.headers = error, headers


class _Body:
    """The body of a request as it is received, and its digest."""

    def __init__(self, receive: Receive) -> None:
        self._receive, self._hash = receive, hashlib.sha256()
        self._read: list[Message] = []
        self._ended = False

    async def receive(self) -> Message:
        """What the app receives: first what was read already."""
        return self._read.pop(0) if self._read else await self._next()

    async def read(self) -> None:
        """Takes the first message, which is the whole body where it is no upload."""
        self._read.append(await self._next())

    async def skip(self) -> None:
        """Reads it to its end."""
        while not self._ended:
            await self._next()

    @property
    def ranks_given(self) -> bool:
        """Whether what was read is a request to rank given candidates, and to do nothing else."""
        try:
            asked = msgspec.json.decode(self._read[0].get("body", b""))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, IndexError):
            return False
        if not isinstance(asked, dict) or asked.get("append_to") is not None:
            return False
        return any(asked.get(name) for name in CANDIDATES)

    @property
    def digest(self) -> bytes:
        """Of what has come."""
        return self._hash.digest()

    async def _next(self) -> Message:
        message = await self._receive()
        self._hash.update(message.get("body", b""))
        self._ended = message["type"] == "http.disconnect" or not message.get("more_body", False)
        return message


async def _replay(kept: KeptAnswer, body: _Body, scope: Scope, send: Send) -> None:
    await body.skip()
    if body.digest != kept.asked:
        raise _Refused(_reused())
    response = Response(kept.body, kept.status)
    response.raw_headers = [*kept.headers, REPLAYED]
    await response(scope, body.receive, send)


def _reused() -> InvalidField:
    return InvalidField(f"this {HEADER} was used for another request; take a new one for each", param=HEADER)
