"""Whether a request is sent again, and when: a pure decision."""

from __future__ import annotations

from dataclasses import dataclass

from inward_client.errors import (
    Conflict,
    ConnectionFailed,
    DeadlineExceeded,
    InwardError,
    ServerError,
    StatusError,
    UnreadableAnswer,
)

AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses after which another try may go better."""
REFUSED = frozenset({429, 503})
"""Of those, the ones that say that nothing was done."""


@dataclass(frozen=True)
class Retries:
    """How patient a client is."""

    patience: float = 30.0
    """Seconds after the first failure of a request for which it is sent again; 0 gives up at once."""
    first: float = 0.5
    """Seconds before the second try where the service does not say; doubled with each further one."""
    cap: float = 10.0
    """Longest such wait in seconds. A wait that the service asks for is kept, however long, or else not begun."""


DEFAULT = Retries()


def wait_before_retry(
    failure: InwardError, tries: int, failing_s: float, retries: Retries, *, repeatable: bool, chance: float
) -> float | None:
    """Seconds to wait before the request is sent again; None gives up.

    ``Retry-After`` is obeyed (doubled with each try while an earlier try of the same request is being worked out), and
    up to a quarter of the wait is added, so that callers refused together do not come back together. A wait that would
    outlast the patience is not begun.

    Args:
        failure: of the last try.
        tries: how often the request was sent.
        failing_s: seconds since the first failure.
        repeatable: the service does the work once however often it gets the request.
        chance: uniform in [0, 1).
    """
    if not _worth_it(failure, repeatable):
        return None
    asked = failure.retry_after if isinstance(failure, StatusError) else None
    doubled = 2.0 ** min(tries - 1, 30)
    wait = min(retries.first * doubled, retries.cap)
    if asked is not None and isinstance(failure, Conflict):
        wait = asked * doubled  # how long an earlier try still takes, the service can't know
    elif asked is not None:
        wait = max(asked, 0.0 if tries == 1 else wait)  # "at once", again and again, is not obeyed
    left = retries.patience - failing_s
    if wait >= left:
        return None
    return float(min(wait * (1 + chance / 4), left))


def _worth_it(failure: InwardError, repeatable: bool) -> bool:
    if isinstance(failure, ConnectionFailed):
        return repeatable or not failure.sent
    if isinstance(failure, UnreadableAnswer):
        return repeatable
    if isinstance(failure, Conflict):  # 409 with Retry-After: the same request is being worked out for an earlier try
        return failure.retry_after is not None
    if isinstance(failure, DeadlineExceeded) and failure.code:  # of the service, not of a proxy: as long as last time
        return False
    if isinstance(failure, ServerError) and failure.of_one_element:  # it would fail again, and take workers along
        return False
    return isinstance(failure, StatusError) and failure.status in (AGAIN if repeatable else REFUSED)
