"""The one thread that owns the device, and whose turn it is.

Reading and drawing take turns: one packed run, one token step, and so on while there is work of both kinds. So a long
drawing never keeps a score waiting for more than one step, nor many scores a drawing for more than one run. Work that
nobody waits for any more is dropped at its next turn.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

from inward.backbones.transformers.generate import Drawing, Sampler, settle, settle_error
from inward.errors import EngineDead
from inward.types import Sample

R = TypeVar("R")
Turns = Generator[None, None, R]
"""Work that is done in turns: it yields after each, and returns its result."""
STALL_S = 900.0
"""A turn is one forward pass. One that takes longer than this will not end."""
JOIN_S = 1.0
"""Between looks whether the thread still makes progress, when it is waited for."""


class Scheduler:
    """Takes work from any event loop; all of it is computed on a thread of its own."""

    def __init__(self, sampler: Sampler, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._sampler = sampler
        self._clock = clock
        self._reads: deque[tuple[Turns[Any], Future[Any]]] = deque()
        self._drawings: deque[Drawing] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._failure: str | None = None
        self._began: float | None = None
        self._thread = threading.Thread(target=self._run, name="backbone", daemon=True)
        self._thread.start()

    @property
    def dead(self) -> str | None:
        """Why nothing can be computed any more."""
        if self._failure is None and self._stalled:
            return f"the device has made no progress for {STALL_S:.0f} s"
        return self._failure

    @property
    def _stalled(self) -> bool:
        began = self._began
        return began is not None and self._clock() - began > STALL_S

    async def read(self, work: Turns[R]) -> R:
        """Does ``work`` in turns; cancelling the caller ends it after the current one.

        Raises:
            EngineDead: the device can't compute any more.
        """
        future: Future[R] = Future()
        self._submit(lambda: self._reads.append((work, future)))
        return await asyncio.wrap_future(future)

    async def draw(self, drawing: Drawing) -> list[Sample]:
        """Draws; cancelling the caller ends it after the current token.

        Raises:
            EngineDead: the device can't compute any more.
        """
        self._submit(lambda: self._drawings.append(drawing))
        return await asyncio.wrap_future(drawing.future)

    def _submit(self, add: Callable[[], None]) -> None:
        with self._changed:
            if self.dead:
                raise _dead(self.dead)
            add()
            self._changed.notify()

    async def close(self) -> None:
        """Work in flight is finished first, unless the device does not come back from it."""
        with self._changed:
            self._failure = self._failure or "it was closed"
            self._closing = True
            self._changed.notify()
        while self._thread.is_alive() and not self._stalled:
            await asyncio.to_thread(self._thread.join, JOIN_S)

    def _run(self) -> None:
        with torch.inference_mode():
            while self._work_to_do():
                self._began = self._clock()
                try:
                    self._read_turn()
                    self._sampler.step()
                except Exception as error:  # the device's (a CUDA context does not survive it), or a defect of ours
                    self._fail(error)
                self._began = None

    def _work_to_do(self) -> bool:
        """Waits for some; False when the thread should end."""
        with self._changed:
            while not (self._reads or self._drawings or self._sampler.busy or self._closing):
                self._changed.wait()
            while self._drawings:
                self._sampler.add(self._drawings.popleft())
            return bool(self._reads or self._sampler.busy)

    def _read_turn(self) -> None:
        if not self._reads:
            return
        work, future = self._reads[0]
        if future.cancelled():
            work.close()
            self._reads.popleft()
            return
        try:
            next(work)
        except StopIteration as stop:
            self._reads.popleft()
            settle(future, stop.value)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            self._reads.popleft()
            settle_error(future, error)

    def _fail(self, error: Exception) -> None:
        with self._changed:
            self._failure = f"the device failed: {error}"
            while self._drawings:
                self._sampler.add(self._drawings.popleft())
            self._sampler.abort(_dead(self._failure))
            while self._reads:
                settle_error(self._reads.popleft()[1], _dead(self._failure))


def _dead(why: str) -> EngineDead:
    return EngineDead(f"the backbone cannot compute any more: {why}")
