"""Who may come in: holders of a key, as ``Authorization: Bearer KEY``, as Basic with the key as password, or as
``x-api-key``.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import logging
from collections.abc import Set
from contextvars import ContextVar
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from inward import logs
from inward.api.answers import refusal
from inward.errors import SetupError, Unauthorized

LOG = logs.logger("api")
CALLER: ContextVar[str | None] = ContextVar("caller", default=None)
"""Hash of the key that the present request came with; None where no keys are set, and outside of requests."""
HEALTH = frozenset({"/livez", "/readyz", "/health"})


class KeyRing:
    """The keys that are let in: some for good, and those of a file that is read again whenever it changes.

    So keys are rotated without a restart: add the new one to the file, move the clients, take the old one out. A file
    that is away or empty for a moment (it is being written) locks nobody in or out: the last keys stay.

    Args:
        keys: for good.
        file: one key a line; empty lines and those that begin with ``#`` are skipped.

    Raises:
        SetupError: the file can't be read, or has no key.
    """

    def __init__(self, keys: Set[str] = frozenset(), file: Path | None = None) -> None:
        self._file, self._stamp = file, None if file is None else _stamp(file)
        self._fixed = {_digest(key.encode()) for key in keys}
        self._read: set[bytes] = set()
        if file is not None:
            try:
                self._read = _keys(file)
            except OSError as error:
                raise SetupError(
                    f"the file of API keys can't be read: {error.strerror} (--api-keys-file {file})"
                ) from None
            if not self._read:
                raise SetupError(f"{file} has no key: write one a line (--api-keys-file)")

    def __bool__(self) -> bool:
        """Whether there are keys; without any, all is open."""
        return bool(self._fixed or self._read)

    def knows(self, given: bytes | None) -> bool:
        """Compares digests with every key's, each in constant time, so that the time taken tells nothing, not even a
        length.
        """
        if given is None:
            return False
        self._look()
        digest = _digest(given)
        return sum(hmac.compare_digest(digest, key) for key in self._fixed | self._read) > 0

    def _look(self) -> None:
        """Reads the file again, if it is another one than it was."""
        if self._file is None or (stamp := _stamp(self._file)) == self._stamp or stamp is None:
            return
        try:
            keys = _keys(self._file)
        except OSError:
            return
        if keys:
            self._read, self._stamp = keys, stamp
            logs.event(LOG, "keys_read", severity=logging.WARNING, keys=len(keys))


class Auth:
    """Guards every route, also those that do not exist, except health and what else is ``open_paths``. No keys: all
    is open.
    """

    def __init__(self, app: ASGIApp, *, keys: KeyRing, open_paths: Set[str] = HEALTH) -> None:
        self.app = app
        self._keys = keys
        self._open = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._keys and scope["path"] not in self._open:
            given = credential(Headers(scope=scope))
            if not self._keys.knows(given):
                missing = "a key is needed" if given is None else "this key is not known"
                message = f'{missing}; send "Authorization: Bearer KEY", or Basic with the key as password'
                await refusal(Unauthorized(message))(scope, receive, send)
                return
            CALLER.set(hashlib.sha256(given or b"").hexdigest())
        await self.app(scope, receive, send)


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


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _keys(file: Path) -> set[bytes]:
    lines = (line.strip() for line in file.read_bytes().splitlines())
    return {_digest(line) for line in lines if line and not line.startswith(b"#")}


def _stamp(file: Path) -> tuple[int, int, int] | None:
    """What differs once the file was written or another one was put in its place (as Kubernetes does); None where
    there is none.
    """
    try:
        about = file.stat()
    except OSError:
        return None
    return about.st_mtime_ns, about.st_size, about.st_ino
