"""``Idempotency-Key``: who asks again with the same key and the same body gets the same answer, worked out once.

Only answers with status 200 or 201 are kept, and no streams of events; after an error the caller may ask again. The key
belongs to the credential that it came with.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Set

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inward.api.answers import JSON, refusal
from inward.errors import Conflict, InvalidField, Unavailable
from inward.stores.idempotency import IdempotencyStore

KEY = re.compile(r"[\x21-\x7e]{1,255}")
HEADER = "Idempotency-Key"
GOOD = (200, 201)


class Idempotency:
    """Stands inside ``Door``, which hands it the whole body at once and cancels it when the caller hangs up.

    ``uploads`` are paths whose bodies come in pieces; there the declared length stands for the body.
    """

    def __init__(self, app: ASGIApp, *, answered: IdempotencyStore, uploads: Set[str] = frozenset()) -> None:
        self.app = app
        self._answered, self._uploads = answered, uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        given = headers.get(HEADER)
        if given is None or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        if not KEY.fullmatch(given):
            malformed = InvalidField(f"{HEADER} must be 1 to 255 visible ASCII characters without spaces", param=HEADER)
            await refusal(malformed)(scope, receive, send)
            return
        message = await receive()
        key = hashlib.sha256(f"{headers.get('authorization', '')} {given}".encode()).hexdigest()
        body = (
            headers.get("content-length", "").encode() if scope["path"] in self._uploads else message.get("body", b"")
        )
        request = hashlib.sha256(b" ".join((scope["path"].encode(), scope["query_string"], body))).hexdigest()
        try:
            asked = await self._answered.begin(key, request)
        except Unavailable as error:
            await refusal(error)(scope, receive, send)
            return
        if asked is None:
            await self._work_out(key, request, scope, _again(message, receive), send)
        elif asked.request != request:
            reused = InvalidField(f"this {HEADER} was used for another request; take a new one for each", param=HEADER)
            await refusal(reused)(scope, receive, send)
        elif asked.answer is None:
            conflict = Conflict(
                f"a request with this {HEADER} is being worked out; ask again in a second", param=HEADER
            )
            await refusal(conflict, headers={"retry-after": "1"})(scope, receive, send)
        else:
            await Response(asked.answer, 200, {"idempotency-replayed": "true"}, JSON)(scope, receive, send)

    async def _work_out(self, key: str, request: str, scope: Scope, receive: Receive, send: Send) -> None:
        chunks, whole, kept = [], False, False

        async def listen(message: Message) -> None:
            nonlocal whole, kept
            if message["type"] == "http.response.start":
                kept = message["status"] in GOOD and Headers(raw=message["headers"]).get("content-type") == JSON
            elif kept:
                chunks.append(message.get("body", b""))
                if not message.get("more_body", False):  # before it is sent: who loses it on the way finds it
                    await self._answered.finish(key, request, b"".join(chunks))
                    whole = True
            await send(message)

        try:
            await self.app(scope, receive, listen)
        finally:
            if not whole:
                await asyncio.shield(self._answered.forget(key))


def _again(first: Message, receive: Receive) -> Receive:
    messages = [first]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay
