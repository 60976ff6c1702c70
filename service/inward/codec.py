"""Jobs and outcomes as bytes: one version byte, then msgpack. Never pickle.

A message is a map of field names, so a reader skips fields that it does not know and fills in the default of those that
are missing: adding a field with a default keeps the version. What changes a meaning makes a new version, and a function
in ``UPGRADES`` that turns the fields of the version before it into its own; so messages that were on their way during
an upgrade are understood.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

import msgpack

from inward.types import Failed, Group, HeadRef, Job, Outcome, Sample, SamplingSpec, Scored, Scores, Timing, Usage

VERSION = 1
UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""From a version to the one after it."""

T = TypeVar("T")


class Unreadable(ValueError):
    """Bytes that are no message, or one of a version that this process does not know."""


def encode(message: Job | Outcome) -> bytes:
    """``message`` with its version."""
    match message:
        case Job():
            body = _plain(message, "job")
        case Scored():
            body = _plain(message, "scored")
        case Failed():
            body = _plain(message, "failed")
    return bytes([VERSION]) + bytes(msgpack.packb(body, default=_pack))


def encode_map(kind: str, body: Mapping[str, Any]) -> bytes:
    """Any map of plain values, such as what a worker says of itself or a request to it, with the version."""
    return bytes([VERSION]) + bytes(msgpack.packb({"is": kind, **body}, default=_pack))


def decode_map(data: bytes, *kinds: str) -> dict[str, Any]:
    """The map that ``encode_map`` was given; its kind is under ``is``.

    Raises:
        Unreadable: none of these kinds, or of a version that this process does not know.
    """
    return _body(data, *kinds)


def decode_job(data: bytes) -> Job:
    """The job that ``encode`` was given.

    Raises:
        Unreadable: not a job, or of a version that this process does not know.
    """
    body = _body(data, "job")
    try:
        body["group"] = _group(body["group"])
        body["details"] = frozenset(body.get("details", ()))
        body["heads"] = tuple(body["heads"])
        return _build(Job, body)
    except (KeyError, TypeError) as error:
        raise Unreadable(f"a job lacks a field or has one of the wrong type: {error}") from error


def decode_outcome(data: bytes) -> Outcome:
    """The outcome that ``encode`` was given.

    Raises:
        Unreadable: not an outcome, or of a version that this process does not know.
    """
    body = _body(data, "scored", "failed")
    try:
        body["timing"] = _build(Timing, body.get("timing", {}))
        if body["is"] == "failed":
            return _build(Failed, body)
        body["heads"] = tuple(_build(HeadRef, ref) for ref in body["heads"])
        body["scores"] = tuple(_scores(scores) for scores in body["scores"])
        body["usage"] = _build(Usage, body["usage"])
        body["samples"] = tuple(_build(Sample, {**s, "ids": tuple(s["ids"])}) for s in body.get("samples", ()))
        return _build(Scored, body)
    except (KeyError, TypeError) as error:
        raise Unreadable(f"an outcome lacks a field or has one of the wrong type: {error}") from error


def _body(data: bytes, *kinds: str) -> dict[str, Any]:
    version = data[0] if data else 0
    try:
        body = msgpack.unpackb(data[1:], strict_map_key=False)
    except (ValueError, msgpack.UnpackException) as error:
        raise Unreadable(f"not a message of ours: {error}") from error
    for old in range(version, VERSION):
        if old not in UPGRADES:
            raise Unreadable(
                f"a message of version {version}; this process reads version {min(UPGRADES, default=VERSION)} to {VERSION}"
            )
        body = UPGRADES[old](body)
    if version > VERSION:
        raise Unreadable(
            f"a message of version {version}; this process reads up to {VERSION}: upgrade workers before API replicas"
        )
    if not isinstance(body, dict) or body.get("is") not in kinds:
        raise Unreadable(f"not a {' or '.join(kinds)}")
    return body


def _plain(message: Any, kind: str) -> dict[str, Any]:
    return {"is": kind} | {field.name: getattr(message, field.name) for field in fields(message)}


def _pack(value: Any) -> Any:
    """Values that msgpack does not know: our own types as maps, sets as lists, mappings as maps."""
    if hasattr(value, "__dataclass_fields__"):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, frozenset):
        return sorted(value)
    raise TypeError(
        f"a {type(value).__name__} can't be sent between processes; make it numbers, strings, lists or maps"
    )


def _build(cls: Callable[..., T], body: Mapping[str, Any]) -> T:
    known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    return cls(**{name: value for name, value in body.items() if name in known})


def _group(body: Mapping[str, Any]) -> Group:
    sampling = body.get("sampling")
    if sampling is not None:
        sampling = _build(SamplingSpec, {**sampling, "stop": tuple(sampling.get("stop", ()))})
    return Group(tuple(body["prompt_ids"]), tuple(tuple(ids) for ids in body.get("responses_ids", ())), sampling)


def _scores(body: Mapping[str, Any]) -> Scores:
    lists = {
        name: tuple(body[name]) for name in ("scores_N", "probability_N", "layers_N") if body.get(name) is not None
    }
    tokens = body.get("tokens_N")
    return _build(
        Scores, {**body, **lists, "tokens_N": None if tokens is None else tuple(tuple(row) for row in tokens)}
    )
