"""Everything that can go wrong, drawn as a tree.

InwardError
├── RequestError            400  the caller's fault, nothing was lost
│   ├── InvalidField        422  a field is missing, unknown or of the wrong type or value
│   ├── Unauthorized        401  no key, or a wrong one
│   ├── Forbidden           403  a key that may not do this
│   ├── NotFound            404  no such head, version, route
│   ├── TooSlow             408  the body did not come in time
│   ├── Conflict            409  another state than the request assumes (a stale sequence number)
│   ├── TooLarge            413  body, number of items, or tokens over the limit
│   ├── UnknownEncoding     415  a body that was compressed
│   └── OverQuota           429  a key used up its own quota
├── Unavailable             503  not now: come back after ``retry_after`` seconds
│   ├── Overloaded          503  the queue is full
│   ├── ShardAway           503  one Redis of several is away, and this prompt's jobs go through it
│   └── EngineDead          503  the backbone can't compute any more
├── DeadlineExceeded        504  the answer would have come too late
├── InternalError           500  a defect of ours
│   └── NotFinite           500  a score came out as NaN or infinite (never passed on)
└── SetupError              —    refuses to start, and says what to do
    ├── HeadError           —    a head can't be loaded: wrong backbone, damaged file, future format
    └── DataError           —    a data file can't be used: says which line and why
"""

from __future__ import annotations

from typing import Any, ClassVar, Self


class InwardError(Exception):
    """Base of the tree. ``param`` is the path of the field to blame, such as ``pairs.3.chosen``."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "internal_error"
    code: ClassVar[str] = "error"

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after

    def at(self, param: str | None) -> Self:
        """The same error, for which another field is to blame."""
        return type(self)(self.message, param=param, retry_after=self.retry_after)

    def body(self) -> dict[str, Any]:
        """The one shape in which every native route reports an error."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class RequestError(InwardError):
    status, type, code = 400, "invalid_request_error", "bad_request"


class InvalidField(RequestError):
    status, code = 422, "invalid_field"


class Unauthorized(RequestError):
    status, type, code = 401, "authentication_error", "unauthorized"


class Forbidden(RequestError):
    status, type, code = 403, "permission_error", "forbidden"


class NotFound(RequestError):
    status, type, code = 404, "not_found_error", "not_found"


class TooSlow(RequestError):
    status, type, code = 408, "timeout_error", "too_slow"


class Conflict(RequestError):
    status, type, code = 409, "conflict_error", "conflict"


class TooLarge(RequestError):
    status, code = 413, "too_large"


class UnknownEncoding(RequestError):
    status, code = 415, "unknown_encoding"


class OverQuota(RequestError):
    status, type, code = 429, "rate_limit_error", "over_quota"


class Unavailable(InwardError):
    status, type, code = 503, "unavailable_error", "unavailable"


class Overloaded(Unavailable):
    code = "overloaded"


class ShardAway(Unavailable):
    code = "shard_away"


class EngineDead(Unavailable):
    code = "engine_dead"


class DeadlineExceeded(InwardError):
    status, type, code = 504, "timeout_error", "deadline_exceeded"


class InternalError(InwardError):
    code = "internal_error"


class NotFinite(InternalError):
    code = "not_finite"


class SetupError(InwardError):
    type, code = "setup_error", "setup_error"


class HeadError(SetupError):
    code = "head_error"


class DataError(SetupError):
    code = "data_error"


def tree(root: type[InwardError] = InwardError) -> list[type[InwardError]]:
    """``root`` and every class below it that stands here: finer kinds elsewhere are told by the code of these."""
    below = [child for child in root.__subclasses__() if child.__module__ == __name__]
    return [root, *(cls for child in below for cls in tree(child))]


def from_code(code: str, message: str, *, param: str | None = None) -> InwardError:
    """The error that a ``Failed`` outcome stands for, to be raised on the other side of a queue."""
    cls = next((cls for cls in tree() if cls.code == code), InternalError)
    return cls(message, param=param)
