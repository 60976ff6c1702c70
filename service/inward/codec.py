"""Jobs, news of them and outcomes as bytes: a version byte, a byte for the kind of message, then MessagePack. Never
pickle.

A dataclass is a map of its field names, so a reader skips fields that it does not know and fills in the default of
those that are missing: adding a field with a default keeps the version. Types are checked on the way in, because a
queue is a trust boundary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from inward.types import Ended, Failed, Job, News, Outcome, Piece, Scored

VERSION = 2
JOB, SCORED, FAILED, MAP, PIECE, ENDED = b"JSFMPE"
_ENCODER = msgspec.msgpack.Encoder(order="deterministic")  # equal jobs are equal bytes, whatever the order of a set
_JOBS = msgspec.msgpack.Decoder(Job)
_SCORED = msgspec.msgpack.Decoder(Scored)
_FAILED = msgspec.msgpack.Decoder(Failed)
_PIECES = msgspec.msgpack.Decoder(Piece)
_ENDED = msgspec.msgpack.Decoder(Ended)
_MAPS = msgspec.msgpack.Decoder(dict[str, Any])

T = TypeVar("T")


class Unreadable(ValueError):
    """Bytes that are no message, or one of a version that this process does not know."""


def encode(message: Job | News | Outcome) -> bytes:
    """``message`` with its version and kind."""
    match message:
        case Job():
            kind = JOB
        case Piece():
            kind = PIECE
        case Ended():
            kind = ENDED
        case Scored():
            kind = SCORED
        case Failed():
            kind = FAILED
    return _with_kind(kind, message)


def encode_map(kind: str, body: Mapping[str, Any]) -> bytes:
    """Any map of plain values, such as what a worker says of itself or a request to it."""
    return _with_kind(MAP, {"is": kind, **body})


def decode_map(data: bytes, *kinds: str) -> dict[str, Any]:
    """The map that ``encode_map`` was given; its kind is under ``is``.

    Raises:
        Unreadable: none of these kinds, or of a version that this process does not know.
    """
    body = _decoded(data, _MAPS) if _kind(data) == MAP else {}
    if body.get("is") not in kinds:
        raise Unreadable(f"not a {' or '.join(kinds)}")
    return body


def convert(value: Any, kind: type[T]) -> T:
    """A part of a map as the dataclass that it was; fields that this process does not know are skipped.

    Raises:
        Unreadable: a field is missing or of another type.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:  # says which field and type, not the value
        raise Unreadable(f"not a {kind.__name__}: {error}") from error


def decode_job(data: bytes) -> Job:
    """The job that ``encode`` was given.

    Raises:
        Unreadable: not a job, or of a version that this process does not know.
    """
    if _kind(data) != JOB:
        raise Unreadable("not a job")
    return _decoded(data, _JOBS)


def decode_reply(data: bytes) -> News | Outcome:
    """The news or the outcome that ``encode`` was given.

    Raises:
        Unreadable: neither, or of a version that this process does not know.
    """
    kind = _kind(data)
    if kind == PIECE:
        return _decoded(data, _PIECES)
    return _decoded(data, _ENDED) if kind == ENDED else decode_outcome(data)


def decode_outcome(data: bytes) -> Outcome:
    """The outcome that ``encode`` was given.

    Raises:
        Unreadable: not an outcome, or of a version that this process does not know.
    """
    kind = _kind(data)
    if kind == SCORED:
        return _decoded(data, _SCORED)
    if kind == FAILED:
        return _decoded(data, _FAILED)
    raise Unreadable("not an outcome")


def _with_kind(kind: int, body: Any) -> bytes:
    buffer = bytearray((VERSION, kind))
    try:
        _ENCODER.encode_into(body, buffer, 2)
    except TypeError as error:
        raise TypeError(
            f"this can't be sent between processes ({error}); make it numbers, strings, lists or maps"
        ) from None
    return bytes(buffer)


def _kind(data: bytes) -> int:
    if len(data) < 2:
        raise Unreadable("not a message of ours: it has no version and kind")
    if data[0] != VERSION:
        raise Unreadable(
            f"a message of version {data[0]}, and this process reads version {VERSION}: run API replicas and workers of"
            " one version"
        )
    return data[1]


def _decoded(data: bytes, decoder: msgspec.msgpack.Decoder[T]) -> T:
    try:
        return decoder.decode(memoryview(data)[2:])
    except msgspec.DecodeError as error:  # says which field and type, not the value
        raise Unreadable(f"not a message of ours: {error}") from error
    except UnicodeDecodeError as error:
        raise Unreadable(f"not a message of ours: text is not UTF-8 at its byte {error.start}") from error
