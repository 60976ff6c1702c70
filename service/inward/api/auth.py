"""Who may come in: holders of a key, as ``Authorization: Bearer KEY``, as Basic with the key as password, or as
``x-api-key``; and who may do what.
"""

from __future__ import annotations

import base64
import binascii
import time
from collections.abc import Callable, Set
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from fastapi import Depends
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from inward.api.answers import refusal
from inward.api.keys import SCOPES, KeyRing
from inward.api.keys import Scope as KeyScope
from inward.errors import Forbidden, Unauthorized

HEALTH = frozenset({"/livez", "/readyz", "/health"})


@dataclass(slots=True)
class Caller:
    """Whose key the present request came with, and what it has asked for so far."""

    name: str
    """Of the key."""
    id: str = ""
    """Digest of the key."""
    scope: KeyScope = "read"
    quota: int | None = None
    """Tokens a minute, where the key has its own number."""
    let_in: bool = False
    """Something of it was admitted."""
    tokens: int = 0
    """Of what was let in."""
    restricted: bool = False
    """It asked for what not every key may do."""


CALLER: ContextVar[Caller | None] = ContextVar("caller", default=None)
"""None where no keys are set, and outside of requests."""


class Auth:
    """Guards every route, also those that do not exist, except health and what else is ``open_paths``. No keys: all
    is open.

    Args:
        clock: Unix seconds.
    """

    def __init__(
        self, app: ASGIApp, *, keys: KeyRing, open_paths: Set[str] = HEALTH, clock: Callable[[], float] = time.time
    ) -> None:
        self.app = app
        self._keys, self._open, self._clock = keys, open_paths, clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._keys or scope["path"] in self._open:
            await self.app(scope, receive, send)
            return
        given = credential(Headers(scope=scope))
        key = self._keys.find(given)
        if key is None or key.expired(self._clock()):
            missing = "a key is needed" if given is None else "this key is not known"
            missing = missing if key is None else "this key has expired"
            message = f'{missing}; send "Authorization: Bearer KEY", or Basic with the key as password'
            await refusal(Unauthorized(message))(scope, receive, send)
            return
        scope["caller"] = caller = Caller(key.name, key.sha256, key.scope, key.quota)  # for the access log
        token = CALLER.set(caller)
        try:
            await self.app(scope, receive, send)
        finally:
            CALLER.reset(token)


def needs(scope: KeyScope) -> Any:
    """What a route depends on that not every key may use.

    Raises:
        Forbidden: from within, for a key of another scope.
    """

    async def check() -> None:
        caller = CALLER.get()
        if caller is None:  # without keys all is open
            return
        caller.restricted = True
        if SCOPES.index(caller.scope) < SCOPES.index(scope):
            raise Forbidden(f"the key {caller.name!r} has the scope {caller.scope}, and this needs {scope}")

    return Depends(check)


def credential(headers: Headers) -> bytes | None:
    """The key in an ``Authorization`` header, else in ``x-api-key``, as gateways send it; None where there is none."""
    if "authorization" not in headers and (key := headers.get("x-api-key")):
        return key.strip().encode("latin-1")
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode("latin-1")  # Starlette reads headers as Latin-1
    if scheme.lower() != "basic":
        return None
    try:
        return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return None
