"""What becomes of a job whose worker ended: it is taken over, at last run alone, and then given up as a dead letter."""

from __future__ import annotations

AT_ONCE = 16
"""Jobs of dead workers that one takes over at once. Should the one that ended them be among them, so many are suspects
next time."""


def alone(deliveries: int, most: int) -> bool:
    """Whether this delivery is to a worker that runs the job by itself: the last that it has left, so that a job that
    ends workers takes no other along.
    """
    return 1 < deliveries >= most


def given_up(deliveries: int, most: int) -> str | None:
    """Why the job is not run again; None while it may be."""
    return f"{deliveries - 1} workers ended while they had it" if deliveries > most else None
