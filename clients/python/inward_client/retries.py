"""Whether a request is sent again, and when: a pure decision."""

from __future__ import annotations

from dataclasses import dataclass

from inward_client.errors import Conflict, ConnectionFailed, InwardError, StatusError, UnreadableAnswer

AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses after which another try may go better."""
REFUSED = frozenset({429, 503})
"""Of those, the ones that say that nothing was done."""


@dataclass(frozen=True)
class Retries:
    """How patient a client is."""

    most: int = 4
    """How often a request is sent again at most; 0 gives up at once."""
    first: float = 0.5
    """Seconds before the second try where the service does not say; doubled with each further one."""
    cap: float = 60.0
    """Longest wait in seconds, whatever the service says."""


DEFAULT = Retries()


def wait_before_retry(
    failure: InwardError, tries: int, retries: Retries, *, repeatable: bool, chance: float
) -> float | None:
    """Seconds to wait before the request is sent again; None gives up.

    ``Retry-After`` is obeyed up to the cap (doubled with each try while an earlier try of the same request is being
    worked out), and up to a quarter of the wait is added, so that callers refused together do not come back together.

    Args:
        failure: of the last try.
        tries: how often the request was sent.
        repeatable: the service does the work once however often it gets the request.
        chance: uniform in [0, 1).
    """
    if tries > retries.most or not _worth_it(failure, repeatable):
        return None
    asked = failure.retry_after if isinstance(failure, StatusError) else None
    doubled = 2.0 ** min(tries - 1, 30)
    wait = retries.first * doubled if asked is None else asked
    if asked is not None and isinstance(
        failure, Conflict
    ):  # how long an earlier try still takes, the service can't know
        wait *= doubled
    return float(min(max(wait, 0.0), retries.cap) * (1 + chance / 4))


def _worth_it(failure: InwardError, repeatable: bool) -> bool:
    if isinstance(failure, ConnectionFailed):
        return repeatable or not failure.sent
    if isinstance(failure, UnreadableAnswer):
        return repeatable
    if isinstance(failure, Conflict):  # 409 with Retry-After: the same request is being worked out for an earlier try
        return failure.retry_after is not None
    return isinstance(failure, StatusError) and failure.status in (AGAIN if repeatable else REFUSED)
