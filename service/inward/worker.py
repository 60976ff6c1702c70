"""The loop of a process that owns a backbone: take, pack, score, settle; drain when told to.

A batch is closed as late as possible: while the device works, the next one fills up; it is closed early only when it is
full. So there is no timer, no waiting when idle, and the device finds its next batch ready. Jobs that draw go beside
the batches where the backbone can do both in turns: they take long, and nobody's score waits for them.

A queue is a trust boundary: what is longer than the model takes is refused here, too. And the device is watched: where
it makes no progress, the jobs are for others, and this loop ends, as its process has to.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from inward import logs, metrics, tracing
from inward.batching import pack
from inward.engine import Engine
from inward.errors import DeadlineExceeded, EngineDead, InternalError, TooLarge
from inward.queues.base import Closed, Consumer
from inward.types import Failed, Job, Outcome

LOG = logs.logger("worker")
DRAWINGS_HELD = 4
"""Jobs that wait to be drawn here, for each that may be drawn at once. More stay in the queue, for whoever is free
sooner, and then so do the scores behind them.
"""
POLL_INTERVAL_S = 1.0
"""Between looks whether a batch that takes long is still wanted, and whether the device still makes progress."""


class Worker:
    """Serves ``queue`` with ``engine`` until the queue is closed and empty. ``clock`` gives Unix seconds; ``shared``
    says whether others take from the queue, too.
    """

    def __init__(
        self, queue: Consumer, engine: Engine, *, clock: Callable[[], float] = time.time, shared: bool = True
    ) -> None:
        self._most_drawings = DRAWINGS_HELD * engine.backbone.capacity.drawings if shared else None
        self._queue = queue
        self._engine = engine
        self._clock = clock
        self._longest = engine.backbone.info.max_tokens
        self._capacity = engine.backbone.capacity
        self._waiting: list[Job] = []  # taken and not yet packed
        self._running: set[asyncio.Task[None]] = set()
        self._drawing: set[asyncio.Task[None]] = set()  # those of them that draw beside the batches
        self._suspects: set[asyncio.Task[None]] = set()  # the one of them that may end this process
        self._taking: asyncio.Task[list[Job]] | None = None
        self._closed = False
        self.dead: str | None = None
        """Why nothing is computed any more."""

    async def run(self) -> None:
        """Returns once the queue is closed and everything taken is settled, or when the engine is dead (see
        ``dead``).
        """
        metrics.ENGINE_UP.set(1)
        try:
            while self.dead is None and (not self._closed or self._waiting or self._running):
                await self._next_event()
                self._look_at_device()
                while self.dead is None and (batch := await self._next_batch()):
                    self._start(batch)
        except Exception as error:  # a defect of ours; others shall have the jobs
            self.dead = f"a defect ended its loop ({type(error).__name__})"
            logs.event(LOG, "worker_failed", severity=logging.ERROR, error=error)
        finally:
            metrics.ENGINE_UP.set(0)
            if self._taking is not None:
                self._taking.cancel()
            if self.dead is not None:
                await asyncio.gather(*self._running, return_exceptions=True)
                await self._queue.release(self._waiting, self.dead)

    def _start(self, batch: Sequence[Job]) -> None:
        task = asyncio.create_task(self._serve(batch))
        kinds = [self._running]
        if batch[0].alone:
            kinds.append(self._suspects)
        elif self._beside(batch[0]):
            kinds.append(self._drawing)
        for tasks in kinds:
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    def _beside(self, job: Job) -> bool:
        """Whether it is drawn beside the batches."""
        return self._capacity.drawings > 0 and job.group.sampling is not None and not job.alone

    def _tokens(self) -> int:
        """Of the jobs that wait for a batch."""
        return sum(job.group.tokens for job in self._waiting if not self._beside(job))

    def _has_room(self) -> bool:
        """Whether more may be taken: not what others could draw sooner."""
        most = self._most_drawings
        return self._tokens() < self._capacity.tokens and (
            most is None or sum(map(self._beside, self._waiting)) <= most
        )

    async def _next_event(self) -> None:
        """Waits until jobs arrive or a batch is done."""
        budget = self._capacity.tokens
        if self._taking is None and not self._closed and self._has_room():
            self._taking = asyncio.create_task(self._queue.take(budget))
        events: set[asyncio.Task[list[Job]] | asyncio.Task[None]] = {*self._running}
        if self._taking is not None:
            events.add(self._taking)
        if not events:
            return
        await asyncio.wait(events, timeout=POLL_INTERVAL_S, return_when=asyncio.FIRST_COMPLETED)
        if self._taking is not None and self._taking.done():
            taking, self._taking = self._taking, None
            try:
                self._waiting += await self._short_enough(taking.result())
            except Closed:
                self._closed = True

    async def _next_batch(self) -> list[Job]:
        """The next batch, if it should start now: the device is idle, or the batch is full and may stand ready. A job
        that draws starts at once, as long as not too many do. Where a job that may end its worker waits, nothing more
        is drawn, then nothing runs at all, and nothing starts before it is done.
        """
        suspect = next((job for job in self._waiting if job.alone), None)
        if suspect is not None and not self._running:
            self._waiting.remove(suspect)
            return await self._due(await self._queue.wanted([suspect])) or await self._next_batch()
        if self._suspects or (suspect is not None and not self._drawing):
            return []
        while suspect is None and (job := self._next_drawing()) is not None:
            if wanted := await self._due(await self._queue.wanted([job])):
                return wanted
        waiting = [job for job in self._waiting if not self._beside(job) and not job.alone]
        busy = len(self._running) - len(self._drawing)
        full = self._tokens() >= self._capacity.tokens
        if not waiting or busy > self._capacity.concurrency or (busy == self._capacity.concurrency and not full):
            return []
        others = [job for job in self._waiting if self._beside(job) or job.alone]
        batch, rest = pack(await self._due(await self._queue.wanted(waiting)), self._capacity.tokens)
        self._waiting = others + rest
        return batch

    def _next_drawing(self) -> Job | None:
        if len(self._drawing) >= self._capacity.drawings:
            return None
        job = next((job for job in self._waiting if self._beside(job)), None)
        if job is not None:
            self._waiting.remove(job)
        return job

    def _look_at_device(self) -> None:
        if not self._engine.backbone.healthy():
            self._die("the device makes no progress, or the backbone has stopped")

    async def _watched(self, batch: Sequence[Job]) -> Sequence[Outcome]:
        """Outcomes of a batch. Where it takes long it is cut short once nobody waits for any of it, or all deadlines
        have passed.

        Raises:
            EngineDead: the device will not come back from it.
        """
        running = asyncio.create_task(self._engine.run(batch, self._queue.tell))
        try:
            while not (await asyncio.wait({running}, timeout=POLL_INTERVAL_S))[0]:
                self._look_at_device()
                if self.dead is not None:
                    raise EngineDead(self.dead)
                wanted = await self._queue.wanted(batch)
                if all(job.deadline <= self._clock() for job in wanted):
                    await self._due(wanted)
                    return ()
            if running.cancelled():  # by whoever else knows it: those who wait have to be told
                raise InternalError("the computation was cancelled")
            return running.result()
        finally:
            running.cancel()

    async def _short_enough(self, jobs: Sequence[Job]) -> list[Job]:
        """Without those that are longer than the model takes, which are settled as such."""
        long = [job for job in jobs if job.group.longest > self._longest]
        if long:
            await self._settle(
                [
                    Failed(job.id, TooLarge.code, f"{job.group.longest} tokens, and the model takes {self._longest}")
                    for job in long
                ]
            )
        return [job for job in jobs if job.group.longest <= self._longest]

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
            outcomes = await self._watched(batch)
            for outcome in outcomes:
                metrics.QUEUE_SECONDS.observe(outcome.timing.queued)
            await self._settle(outcomes)
            tracing.computed(batch, outcomes)
        except EngineDead as error:
            self._die(error.message)
            await self._queue.release(batch, error.message)
        except Exception as error:  # a defect of ours must not leave callers waiting
            logs.event(LOG, "batch_failed", severity=logging.ERROR, error=error)
            failure = f"scoring failed ({type(error).__name__})"
            await self._settle([Failed(job.id, InternalError.code, failure) for job in batch])
        finally:
            metrics.IN_FLIGHT.dec(len(batch))

    def _die(self, reason: str) -> None:
        if self.dead is None:
            self.dead = reason
            logs.event(LOG, "engine_dead", severity=logging.ERROR, reason=reason)

    async def _settle(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            if isinstance(outcome, Failed):
                metrics.FAILURES_TOTAL.labels(reason=outcome.code).inc()
        await self._queue.settle(outcomes)
