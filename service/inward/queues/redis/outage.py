"""Whether Redis is to be had, told once when it goes and once when it is back."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from inward import logs, metrics
from inward.errors import Unavailable
from inward.stores.connection import Refused

LOG = logs.logger("queues.redis")


class Outage:
    """What one side of a queue knows of its Redis.

    Args:
        before: what to say while it was not asked yet; None where it counts as there until it isn't.
        up: is told 1 while it is there, and 0 while it is not.
        who: fields of the events, such as the worker's name.
    """

    def __init__(self, before: str | None = None, up: Callable[[int], None] = metrics.REDIS_UP.set, **who: str) -> None:
        self.reason = before
        """Why Redis is not to be had, as far as we know; None while it is."""
        self.since = time.monotonic() if before is not None else None
        """Monotonic seconds at which that began."""
        self._up = up
        self._who: dict[str, Any] = {**who}
        self._told: str | None = None
        self._answered = 0.0  # when it last did

    def now(self) -> float:
        """Monotonic seconds, for ``began``."""
        return time.monotonic()

    def began(self, error: Unavailable, asked: float | None = None) -> None:
        """It is not there. Told once, and again where it comes back to refuse us, which does not pass by itself. Who
        ``asked`` before it last answered learns nothing new: a command may be given up on after the end of an outage.
        """
        if asked is not None and asked < self._answered:
            return
        if self._told is None or (isinstance(error, Refused) and error.message != self._told):
            self._told = error.message
            logs.event(LOG, "redis_away", severity=logging.ERROR, **self._who, reason=error.message)
        self.since = self.now() if self.reason is None else self.since
        self.reason = error.message
        self._up(0)

    def ended(self) -> None:
        """It answers."""
        if self._told is not None:
            logs.event(LOG, "redis_there", **self._who)
        self.reason = self._told = self.since = None
        self._answered = self.now()
        self._up(1)
