"""What is being waited for, said on the console from time to time."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

LOG = logging.getLogger(__name__)
FIRST_S, EVERY_S = 5.0, 10.0
HINT_S = 60.0
"""A wait this long is told how it could be shorter, once."""


@dataclass
class Progress:
    """Of one wait: ``sampling 12/32, 38 tokens/s``."""

    what: str
    total: int
    hint: str = ""
    done: int = 0
    tokens: int = 0
    began: float = field(default_factory=time.monotonic)

    def line(self) -> str:
        """As it stands."""
        seconds = max(time.monotonic() - self.began, 1e-9)
        rate = f", {self.tokens / seconds:.0f} tokens/s" if self.tokens else ""
        return f"{self.what} {self.done}/{self.total}{rate}"

    async def tell(self) -> None:
        """Until it is cancelled."""
        await asyncio.sleep(FIRST_S)
        hint = self.hint
        while True:
            waited = time.monotonic() - self.began
            LOG.info("%s (%.0f s)", self.line(), waited)
            if hint and waited > HINT_S:
                LOG.info("shorter waits: %s", hint)
                hint = ""
            await asyncio.sleep(EVERY_S)


@asynccontextmanager
async def told(what: str, total: int, hint: str = "") -> AsyncIterator[Progress]:
    """A wait of which the console is told if it is long."""
    progress = Progress(what, total, hint)
    telling = asyncio.create_task(progress.tell())
    try:
        yield progress
    finally:
        telling.cancel()
