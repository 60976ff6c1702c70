"""The loop of a process that owns a backbone: take, pack, score, settle; drain when told to.

A batch is closed as late as possible: while the device works, the next one fills up; it is closed early only when it is
full. So there is no timer, no waiting when idle, and the device finds its next batch ready.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from inward import logs, metrics, tracing
from inward.batching import pack
from inward.engine import Engine
from inward.errors import DeadlineExceeded, EngineDead, InternalError
from inward.queues.base import Closed, Consumer
from inward.types import Failed, Job, Outcome

LOG = logs.logger("worker")
GLANCE = 1.0
"""Seconds between looks whether a batch that samples is still wanted."""


class Worker:
    """Serves ``queue`` with ``engine`` until the queue is closed and empty."""

    def __init__(self, queue: Consumer, engine: Engine, *, clock: Callable[[], float] = time.time) -> None:
        self._queue = queue
        self._engine = engine
        self._clock = clock
        self._capacity = engine.backbone.capacity
        self._waiting: list[Job] = []  # taken and not yet packed
        self._running: set[asyncio.Task[None]] = set()
        self._taking: asyncio.Task[list[Job]] | None = None
        self._closed = False
        self.dead: str | None = None

    async def run(self) -> None:
        """Returns once the queue is closed and everything taken is settled, or when the engine is dead (see
        ``dead``).
        """
        metrics.ENGINE_UP.set(1)
        try:
            while self.dead is None and (not self._closed or self._waiting or self._running):
                await self._next_event()
                while self.dead is None and (batch := await self._next_batch()):
                    task = asyncio.create_task(self._serve(batch))
                    self._running.add(task)
                    task.add_done_callback(self._running.discard)
        finally:
            metrics.ENGINE_UP.set(0)
            if self._taking is not None:
                self._taking.cancel()
            if self.dead is not None:
                await asyncio.gather(*self._running, return_exceptions=True)
                await self._queue.release(self._waiting, self.dead)

    async def _next_event(self) -> None:
        """Waits until jobs arrive or a batch is done."""
        budget = self._capacity.tokens
        if self._taking is None and not self._closed and sum(job.group.tokens for job in self._waiting) < budget:
            self._taking = asyncio.create_task(self._queue.take(budget))
        events: set[asyncio.Task[list[Job]] | asyncio.Task[None]] = {*self._running}
        if self._taking is not None:
            events.add(self._taking)
        if not events:
            return
        await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED)
        if self._taking is not None and self._taking.done():
            taking, self._taking = self._taking, None
            try:
                self._waiting += taking.result()
            except Closed:
                self._closed = True

    async def _next_batch(self) -> list[Job]:
        """The next batch, if it should start now: the device is idle, or the batch is full and may stand ready."""
        busy = len(self._running)
        full = sum(job.group.tokens for job in self._waiting) >= self._capacity.tokens
        if not self._waiting or busy > self._capacity.concurrency or (busy == self._capacity.concurrency and not full):
            return []
        self._waiting = await self._due(await self._queue.wanted(self._waiting))
        batch, self._waiting = pack(self._waiting, self._capacity.tokens)
        return batch

    async def _watched(self, batch: Sequence[Job]) -> Sequence[Outcome]:
        """Outcomes of a batch. Sampling takes long: it is cut short once nobody waits for it, or its deadline has
        passed.
        """
        if all(job.group.sampling is None for job in batch):
            return await self._engine.run(batch)
        running = asyncio.create_task(self._engine.run(batch))
        try:
            while not (await asyncio.wait({running}, timeout=GLANCE))[0]:
                if not await self._due(await self._queue.wanted(batch)):
                    return ()
            return running.result()
        finally:
            running.cancel()

    async def _due(self, jobs: Sequence[Job]) -> list[Job]:
        """Without those whose deadline has passed, which are settled as such."""
        now = self._clock()
        late = [job for job in jobs if job.deadline <= now]
        if late:
            await self._settle([Failed(job.id, DeadlineExceeded.code, "the deadline has passed") for job in late])
        return [job for job in jobs if job.deadline > now]

    async def _serve(self, batch: Sequence[Job]) -> None:
        metrics.IN_FLIGHT.inc(len(batch))
        try:
            outcomes: Sequence[Outcome] = await self._watched(batch)
        except EngineDead as error:
            self.dead = error.message
            logs.event(LOG, "engine_dead", severity=logging.ERROR, reason=error.message)
            await self._queue.release(batch, error.message)
            return
        except Exception as error:  # a defect of ours must not leave callers waiting
            logs.event(LOG, "batch_failed", severity=logging.ERROR, error=error)
            outcomes = [Failed(job.id, InternalError.code, f"scoring failed ({type(error).__name__})") for job in batch]
        finally:
            metrics.IN_FLIGHT.dec(len(batch))
        for outcome in outcomes:
            metrics.QUEUE_SECONDS.observe(outcome.timing.queued)
        await self._settle(outcomes)
        tracing.computed(batch, outcomes)

    async def _settle(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            if isinstance(outcome, Failed):
                metrics.FAILURES_TOTAL.labels(reason=outcome.code).inc()
        await self._queue.settle(outcomes)
