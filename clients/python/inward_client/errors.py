"""Everything that can go wrong, drawn as a tree.

InwardError
├── ConnectionFailed          no answer came
│   └── TimedOut              not within the call's timeout
├── UnreadableAnswer          an answer came that is not the service's (a proxy's page, a truncated body)
└── StatusError               the service refused; one class for each status
    ├── BadRequest       400
    ├── Unauthorized     401
    ├── Forbidden        403
    ├── NotFound         404
    ├── TooSlow          408
    ├── Conflict         409
    ├── TooLarge         413
    ├── UnknownEncoding  415
    ├── InvalidField     422
    ├── OverQuota        429
    ├── ServerError      500 and other 5xx
    │   ├── Unavailable        503
    │   └── DeadlineExceeded   504
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class InwardError(Exception):
    """Base of the tree."""


class ConnectionFailed(InwardError):
    """No answer came. ``sent`` says whether the request may have reached the service."""

    def __init__(self, message: str, *, sent: bool = True) -> None:
        super().__init__(message)
        self.sent = sent


class TimedOut(ConnectionFailed):
    """No answer came in time."""


class UnreadableAnswer(InwardError):
    """The answer is not what the service sends."""


class StatusError(InwardError):
    """The service refused.

    Attributes:
        status: of the answer.
        code: the service's name of the error, such as ``too_large``; empty where the answer came from something in
            between.
        param: path of the field to blame, such as ``pairs.3.chosen``.
        request_id: under which the service's log has more.
        retry_after: seconds after which it may be tried again, if the answer says so.
        each: of a list of which no element could be scored, every element's own error; the first one is raised.
    """

    status: int = 0
    by_status: ClassVar[dict[int, type[StatusError]]] = {}

    def __init_subclass__(cls, status: int = 0) -> None:
        if status:
            cls.status = status
            cls.by_status[status] = cls

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str = "",
        param: str | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status or self.status
        self.code = code
        self.param = param
        self.request_id = request_id
        self.retry_after = retry_after
        self.each: Sequence[StatusError] = ()

    def __str__(self) -> str:
        named = f" (request {self.request_id})" if self.request_id else ""
        return f"{self.status}: {self.message}{named}"


class BadRequest(StatusError, status=400):
    """The body is not JSON."""


class Unauthorized(StatusError, status=401):
    """No key, or a wrong one."""


class Forbidden(StatusError, status=403):
    """The key may not do this."""


class NotFound(StatusError, status=404):
    """No such head, version, job or route."""


class TooSlow(StatusError, status=408):
    """The body did not come in time."""


class Conflict(StatusError, status=409):
    """Another state than the request assumes, such as a stale sequence number."""


class TooLarge(StatusError, status=413):
    """Body, number of items, or tokens over the limit."""


class UnknownEncoding(StatusError, status=415):
    """The body has a content encoding that the service does not take."""


class InvalidField(StatusError, status=422):
    """A field is missing, unknown or of a wrong type, or no item can be scored."""


class OverQuota(StatusError, status=429):
    """The key used up its quota."""


class ServerError(StatusError, status=500):
    """A defect of the service, or an element that it can't score."""

    @property
    def of_one_element(self) -> bool:
        """Whether the service blames an element for it: sent again, the same would fail again."""
        return self.status == 500 and bool(self.code) and self.param is not None


class Unavailable(ServerError, status=503):
    """Overloaded, or not able to compute now."""


class DeadlineExceeded(ServerError, status=504):
    """Not done before the deadline."""


CODES = {
    "unauthorized": 401, "forbidden": 403, "not_found": 404, "too_slow": 408, "conflict": 409, "too_large": 413,
    "unknown_encoding": 415, "invalid_field": 422,
    "over_quota": 429, "unavailable": 503, "overloaded": 503, "shard_away": 503, "engine_dead": 503,
    "deadline_exceeded": 504,
}  # fmt: skip
"""Statuses of errors that come where a status can't: in the middle of a stream."""


def of_status(status: int) -> type[StatusError]:
    """The class for a status."""
    return StatusError.by_status.get(status) or (ServerError if status >= 500 else StatusError)
