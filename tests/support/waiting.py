"""Waiting in tests: for what must come, however slow the machine is. A bound is a safety net, never a measure of
speed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

PATIENCE = 300.0
"""Seconds after which what has not come never will."""
EVERY = 0.02
"""Seconds between two looks."""


async def until(condition: Callable[[], Any]) -> Any:
    """Polls until ``condition()``, or what it gives to await, is true; gives that value."""
    end = time.monotonic() + PATIENCE
    while True:
        value = condition()
        if isinstance(value, Awaitable):
            value = await value
        if value:
            return value
        assert time.monotonic() < end, f"it did not come to pass within {PATIENCE:g} s"
        await asyncio.sleep(EVERY)


def wait_until(condition: Callable[[], Any]) -> Any:
    """As ``until``, where there is no event loop, or it may stand still."""
    end = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < end, f"it did not come to pass within {PATIENCE:g} s"
        time.sleep(EVERY)
    return value
