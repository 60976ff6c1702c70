"""The keys that callers hold: named, with a scope, an end and a quota of their own, and never written down themselves.

What is kept of a key is its SHA-256. A slow hash, such as bcrypt, is for passwords, which people choose and others
guess; our keys are 256 random bits, which nobody can try out, and a slow hash would be paid at every request.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
from collections.abc import Sequence, Set
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from inward import logs
from inward.errors import SetupError

LOG = logs.logger("api")
Scope = Literal["read", "update", "admin"]
SCOPES: tuple[Scope, ...] = ("read", "update", "admin")
"""Each may do what those before it may, too. ``read``: score, draw, send bulk jobs, look; ``update``: update and switch
heads; ``admin``: switch policies, lend the device and take it back.
"""
PLAIN = "plain"
"""Name of all keys that are written down as they are, and so have none of their own; they may do everything."""
PREFIX = "inw_"
"""Begins a key, so that whoever looks for secrets in texts finds it."""
NAMED = re.compile(rb"keys\s*:|\{")
"""How a file of named keys begins, as YAML or JSON; any other has one plain key a line."""
YAMLS_OWN = re.compile(rb"---|%YAML\b|%TAG\b")
"""Lines that may come before."""
NO_KEY = re.compile(rb"---|[%{}\[\]\"]|[-\s]*[\w'\"]+\s*:(\s|$)")
"""How lines of YAML and JSON begin: were those of a damaged file taken for keys, everybody could guess them."""
HEADER = "# API keys of Inward: `inward keys new NAME` adds one, `inward keys revoke NAME` takes it out.\n"


def _in_utc(moment: datetime) -> datetime:
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


class Key(BaseModel):
    """What is known of a key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """By which logs and metrics call it."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Of the key."""
    scope: Scope = "read"
    expires: Annotated[datetime, AfterValidator(_in_utc)] | None = None
    """From when on it opens nothing any more; a mere date is its beginning in UTC."""
    quota: int | None = Field(None, ge=1)
    """Tokens a minute, in place of ``INWARD_QUOTA``."""

    def expired(self, now: float) -> bool:
        """``now`` in Unix seconds."""
        return self.expires is not None and self.expires.timestamp() <= now


_KEYS = TypeAdapter(list[Key])


class KeyRing:
    """The keys that are let in: some for good, and those of a file that is read again whenever it changes.

    So keys are rotated without a restart: add the new one to the file, move the clients, take the old one out. A file
    that is away or can't be read for a moment (it is being written) locks nobody in or out: the last keys stay, as
    where the last plain one was taken out. A file of named keys may have none: then nobody is let in.

    Args:
        keys: for good, as they are.
        file: named keys, or plain ones; see ``read_keys``.

    Raises:
        SetupError: the file can't be read, or has no key.
    """

    def __init__(self, keys: Set[str] = frozenset(), file: Path | None = None) -> None:
        self._file, self._stamp = file, None if file is None else _stamp(file)
        self._fixed = [_plain(key.encode()) for key in sorted(keys)]
        self._read: Sequence[Key] = () if file is None else read_keys(file)
        if file is not None and not self._read and not _is_named(file.read_bytes()):
            raise SetupError(f"{file} has no key: `inward keys new NAME` makes one (--api-keys-file)")

    def __bool__(self) -> bool:
        """Whether there are keys; without any, all is open."""
        return bool(self._fixed) or self._file is not None

    def find(self, given: bytes | None) -> Key | None:
        """The key that was given, whether or not it has expired; None where it is not known. Compares digests with
        every key's, each in constant time, so that the time taken tells nothing, not even a length.
        """
        if given is None:
            return None
        self._look()
        digest = hashlib.sha256(given).hexdigest()
        found = [key for key in (*self._fixed, *self._read) if hmac.compare_digest(digest, key.sha256)]
        return found[0] if found else None

    def _look(self) -> None:
        """Reads the file again, if it is another one than it was."""
        if self._file is None or (stamp := _stamp(self._file)) == self._stamp or stamp is None:
            return
        try:
            content = self._file.read_bytes()
            keys = _parsed(self._file, content)
        except OSError:
            return
        except SetupError as error:
            self._stamp = stamp
            logs.event(LOG, "keys_unreadable", severity=logging.ERROR, reason=error.message)
            return
        if keys or _is_named(content):
            self._read, self._stamp = keys, stamp
            logs.event(LOG, "keys_read", severity=logging.WARNING, keys=len(keys))


def read_keys(file: Path) -> Sequence[Key]:
    """The keys of a file: below ``keys:`` (YAML) what ``Key`` has of each, or one plain key a line, where empty lines
    and those that begin with ``#`` are skipped.

    Raises:
        SetupError: it can't be read, or an entry can't be used.
    """
    try:
        return _parsed(file, file.read_bytes())
    except OSError as error:
        raise SetupError(f"the file of API keys can't be read: {error.strerror} (--api-keys-file {file})") from None


def add_key(file: Path, key: Key) -> None:
    """Adds ``key`` to a file of named keys, which is made where there is none.

    Raises:
        SetupError: there is one of that name, or the file has plain keys.
    """
    keys = _named_keys(file) if file.exists() else []
    if any(one.name == key.name for one in keys):
        raise SetupError(f"{file} has a key called {key.name}: revoke it, or choose another name")
    _write(file, [*keys, key])


def revoke_key(file: Path, name: str) -> None:
    """Takes the key called ``name`` out.

    Raises:
        SetupError: there is none.
    """
    keys = _named_keys(file)
    left = [key for key in keys if key.name != name]
    if len(left) == len(keys):
        raise SetupError(f"{file} has no key called {name}; it has {', '.join(key.name for key in keys) or 'none'}")
    _write(file, left)


def make_key(name: str, **fields: Any) -> tuple[str, Key]:
    """A new key: what its holder is given, and what is kept of it; ``fields`` are those of ``Key``.

    Raises:
        SetupError: a field that can't be used.
    """
    if name == PLAIN:
        raise SetupError(f"{PLAIN} is what keys without a name are called; choose another name")
    secret = PREFIX + secrets.token_urlsafe(32)
    try:
        return secret, Key(name=name, sha256=hashlib.sha256(secret.encode()).hexdigest(), **fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise SetupError(f"{first['loc'][0]}: {first['msg']}") from None


def _named_keys(file: Path) -> Sequence[Key]:
    keys = read_keys(file)
    if any(key.name == PLAIN for key in keys):
        raise SetupError(
            f"{file} has plain keys, one a line: make named ones in another file, and give the old ones as "
            "INWARD_API_KEYS until their holders have moved"
        )
    return keys


def _write(file: Path, keys: Sequence[Key]) -> None:
    """In place and with one write, not by renaming: containers that mount a single file go on seeing the old one then.
    A reader that comes in between keeps the keys that it has.
    """
    rows = [key.model_dump(mode="json", exclude_none=True) for key in keys]
    content = (HEADER + yaml.safe_dump({"keys": rows}, sort_keys=False)).encode()
    try:
        with file.open("r+b" if file.exists() else "xb", buffering=0) as stream:
            stream.write(content)
            stream.truncate()
            os.fsync(stream.fileno())
    except OSError as error:
        raise SetupError(f"{file} can't be written: {error.strerror}") from None


def _parsed(file: Path, content: bytes) -> Sequence[Key]:
    if not _is_named(content):
        for line in _lines(content):
            if NO_KEY.match(line):
                number = [one.strip() for one in content.splitlines()].index(line) + 1
                raise SetupError(
                    f"{file}, line {number} is no key: plain keys stand one a line, and a file of named keys begins "
                    "with `keys:` (--api-keys-file)"
                )
        return [_plain(line) for line in _lines(content)]
    try:
        found = yaml.safe_load(content)
        if not isinstance(found, dict) or "keys" not in found:
            raise SetupError(f"{file} has no keys: a file of named keys has them below `keys:` (--api-keys-file)")
        keys = _KEYS.validate_python(found["keys"] or [])
    except yaml.YAMLError as error:
        raise SetupError(f"{file} is no YAML: {' '.join(str(error).split())} (--api-keys-file)") from None
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(map(str, ("keys", *first["loc"])))
        raise SetupError(f"{file}: {where}: {first['msg']} (--api-keys-file)") from None
    names = [key.name for key in keys]
    if twice := next((name for name in names if names.count(name) > 1 or name == PLAIN), None):
        raise SetupError(f"{file}: the name {twice} is taken; each key has its own (--api-keys-file)")
    return keys


def _lines(content: bytes) -> list[bytes]:
    lines = (line.strip() for line in content.splitlines())
    return [line for line in lines if line and not line.startswith(b"#")]


def _is_named(content: bytes) -> bool:
    first = next((line for line in _lines(content) if not YAMLS_OWN.match(line)), b"")
    return NAMED.match(first) is not None


def _plain(key: bytes) -> Key:
    return Key(name=PLAIN, sha256=hashlib.sha256(key).hexdigest(), scope="admin")


def _stamp(file: Path) -> tuple[int, int, int] | None:
    """What differs once the file was written or another one was put in its place (as Kubernetes does); None where
    there is none.
    """
    try:
        about = file.stat()
    except OSError:
        return None
    return about.st_mtime_ns, about.st_size, about.st_ino
