"""The event loop of a process that has none of its own: what blocks runs its coroutines here, in one daemon thread.

A call that is interrupted (Ctrl-C) takes its requests with it, which a blocking socket would not let go.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
_lock = threading.Lock()
_loops: dict[int, asyncio.AbstractEventLoop] = {}
"""By process id: a thread does not live on in a fork."""


def start(coroutine: Coroutine[Any, Any, T]) -> Future[T]:
    """Begins it; cancelling what is given back cancels it."""
    return asyncio.run_coroutine_threadsafe(coroutine, _loop())


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Waits for it; an exception that comes in between, such as KeyboardInterrupt, cancels it."""
    future = start(coroutine)
    try:
        return future.result()
    finally:
        future.cancel()


def _loop() -> asyncio.AbstractEventLoop:
    with _lock:
        loop = _loops.get(os.getpid())
        if loop is None:
            loop = _loops[os.getpid()] = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="inward-client", daemon=True).start()
        return loop
