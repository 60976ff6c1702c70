"""Ctrl-C and SIGTERM: heeded at once while something is waited for, and else when the step is done."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Coroutine, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from typing import Any, TypeVar

from inward_client import event_loop
from inward_trainer.errors import Stopped

T = TypeVar("T")
GRACE_S = 15.0
"""For what ends a step and may still come through; launchers kill 30 s after they asked."""
ECHO_S = 2.0
"""A second signal within this time is the same request: a launcher hands on what the terminal has sent already."""


class Stopping:
    """Whether somebody asked for the end, and the waits that end with it. Waits belong to the main thread."""

    def __init__(self) -> None:
        self.signal: int | None = None
        """The first one that came."""
        self._asked = threading.Event()
        self._asked_at = 0.0
        self._waiting: tuple[Future[Any], float] | None = None

    def request(self, number: int = signal.SIGTERM) -> None:
        """Asks for the end."""
        if self.signal is None:
            self.signal, self._asked_at = number, time.monotonic()
        self._asked.set()
        self._end_wait()

    def check(self) -> None:
        """Raises ``Stopped`` if somebody asked for it."""
        if self.signal is not None:
            raise Stopped(self.signal)

    def wait(self, coroutine: Coroutine[Any, Any, T], grace_s: float = 0.0) -> T:
        """The coroutine's result; once the end is asked for, it has ``grace_s`` seconds left.

        Raises:
            Stopped: it was not done by then, and is cancelled.
        """
        future = event_loop.start(coroutine)
        self._waiting = future, grace_s
        try:
            if self.signal is not None:
                self._end_wait()
            return future.result()
        except CancelledError:
            raise Stopped(self.signal or signal.SIGTERM) from None
        finally:
            self._waiting = None
            future.cancel()

    def sleep(self, seconds: float) -> None:
        """Raises ``Stopped`` if somebody asks for it meanwhile."""
        self._asked.wait(seconds)
        self.check()

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """The first SIGTERM or Ctrl-C asks for the end; another one, later, does what it did before."""
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def heed(number: int, frame: Any) -> None:
            if self.signal is not None and time.monotonic() > self._asked_at + ECHO_S:
                signal.signal(number, before[signal.Signals(number)])
                signal.raise_signal(number)
            self.request(number)

        for number in before:
            signal.signal(number, heed)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _end_wait(self) -> None:
        if self._waiting is None:
            return
        future, grace_s = self._waiting
        if not grace_s:
            future.cancel()
            return
        timer = threading.Timer(grace_s, future.cancel)
        timer.daemon = True
        timer.start()
