"""The API's side of the queue in Redis: submit, wait for the answers on a stream of one's own, stay known to be
alive.
"""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from inward import codec, logs, metrics
from inward.errors import EngineDead, Overloaded, Unavailable
from inward.queues.base import Hear
from inward.queues.redis import scripts
from inward.queues.redis.outage import Outage
from inward.queues.throughput import Throughput
from inward.stores.connection import Arg, Connection, Full
from inward.stores.keys import FORGOTTEN_S, GROUP, Keys
from inward.types import Ended, Failed, Job, Outcome, Piece

LOG = logs.logger("queues.redis")
MOST_REPLIES = 100_000
"""Kept for one replica; it deletes what it has read."""
REPLIES_S = 600
"""For which replies are kept that nobody reads: their replica was killed."""
MOST_PIECES = 10_000
"""Replies that wait for one replica up to which it is told more pieces: so many outcomes are never dropped for them."""
BLOCK_MS = 1000
"""Of one wait for replies."""
UNBOUNDED = 2**62
MOVED = "the workers were replaced by those of another backbone; send it again"


@dataclass(frozen=True, slots=True)
class Beat:
    """What Redis answers to a sign of life: how it is with the queue, over all replicas."""

    jobs: int
    tokens: int
    workers: int
    letters: int
    streams: tuple[tuple[int, int], tuple[int, int]]
    """Of interactive and bulk jobs: those that nobody has claimed, and those that somebody has."""

    def __add__(self, other: Beat) -> Beat:
        """Of two shards. A worker takes from both: there are as many as the shard knows that knows fewest."""
        (a, b), (c, d) = self.streams, other.streams
        return Beat(
            self.jobs + other.jobs,
            self.tokens + other.tokens,
            min(self.workers, other.workers),
            self.letters + other.letters,
            ((a[0] + c[0], a[1] + c[1]), (b[0] + d[0], b[1] + d[1])),
        )


def show(beat: Beat) -> None:
    """In the metrics."""
    metrics.QUEUE_JOBS.set(beat.jobs)
    metrics.QUEUE_TOKENS.set(beat.tokens)
    metrics.WORKERS.set(beat.workers)
    metrics.DEAD_LETTERS_KEPT.set(beat.letters)
    for name, (lag, pending) in zip(("interactive", "bulk"), beat.streams, strict=True):
        metrics.STREAM_LAG.labels(stream=name).set(lag)
        metrics.STREAM_PENDING.labels(stream=name).set(pending)


@contextmanager
def door(closed: bool) -> Iterator[None]:
    """What every request to the queue goes through once: it may be closed, and who is refused behind it is counted."""
    if closed:
        raise Overloaded("the server is shutting down", retry_after=1.0)
    try:
        yield
    except (Overloaded, EngineDead) as error:
        reason = "queue_full" if isinstance(error, Overloaded) else "no_worker"
        metrics.REJECTIONS_TOTAL.labels(reason=reason).inc()
        raise


@dataclass(slots=True)
class _Waiting:
    job: Job
    answer: asyncio.Future[Outcome]
    hear: Hear | None
    admitted: bool = False


class RedisProducer:
    """One API replica.

    Args:
        connection: owned by the caller, who closes it after ``leave``.
        keys: of the queue.
        max_tokens: room for this many open tokens, over all replicas.
        beat: seconds between two signs of life.
        ttl: seconds without one after which workers drop this replica's jobs.
        clock: monotonic seconds, for the pace.
        outage: what is known of this Redis.
        seen: is given what Redis answers to each sign of life.
    """

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        *,
        max_tokens: int,
        beat: float = 1.0,
        ttl: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
        outage: Outage | None = None,
        seen: Callable[[Beat], None] = show,
    ) -> None:
        self.replica = uuid.uuid4().hex
        self.max_tokens = max_tokens
        self.pace = Throughput()
        self.workers = 0
        self._redis, self._keys = connection, keys
        self._outage = outage or Outage("Redis was not asked yet", replica=self.replica)
        self._seen = seen
        self._beat, self._ttl, self._clock = beat, ttl, clock
        self._waiting: dict[str, _Waiting] = {}
        self._leaving: set[str] = set()  # abandoned, and Redis does not know it yet
        self._suspect = False  # an answer may have been lost since the last reconciliation
        self._held = 0
        self._done: int | None = None
        self._closed = False

    @property
    def away(self) -> str | None:
        """Why Redis is not to be had, as far as we know; None while it is."""
        return self._outage.reason

    @property
    def away_for(self) -> float:
        """Seconds for which it has not been."""
        return 0.0 if self._outage.since is None else self._outage.now() - self._outage.since

    @property
    def lost(self) -> str | None:
        """Which part of the queue is away while the rest goes on: one Redis has no parts."""
        return None

    @property
    def served(self) -> str:
        """The backbone that the queue is served with, as far as we know."""
        return self._keys.backbone

    @property
    def open_jobs(self) -> int:
        """Jobs of this replica that are not answered yet."""
        return len(self._waiting)

    async def keep_living(self) -> None:
        """Gives signs of life. Has to run as long as the replica does, and so has ``keep_receiving``."""
        while True:
            await asyncio.sleep(self._beat)
            await self.live()

    async def keep_receiving(self) -> None:
        """Hands out answers as they come."""
        while True:
            asked = self._outage.now()
            try:
                await self.receive(block=self._redis.block_ms(BLOCK_MS))
            except Unavailable as error:
                self._failed(error, asked)
                await asyncio.sleep(self._beat / 2)

    async def submit(self, jobs: Sequence[Job], hear: Hear | None = None) -> list[Awaitable[Outcome]]:
        """As the protocol says."""
        with door(self._closed):
            return await self.place(jobs, hear, self.max_tokens)

    async def place(self, jobs: Sequence[Job], hear: Hear | None, room: int) -> list[Awaitable[Outcome]]:
        """As ``submit``, with room for so many open tokens; a refusal is not counted, since it may be made good
        elsewhere.
        """
        if self.away is not None:
            raise Unavailable(self.away, retry_after=self._beat)
        if not self.workers:
            raise EngineDead("no worker takes jobs from the queue", retry_after=5.0)
        loop = asyncio.get_running_loop()
        entries = [_Waiting(job, loop.create_future(), hear) for job in jobs]
        self._waiting.update((entry.job.id, entry) for entry in entries)  # before the answer can come
        asked = self._outage.now()
        try:
            admitted, held = await self._send(jobs, room)
        except BaseException as error:  # it may have been admitted all the same
            self._forget(jobs)
            self._leaving |= {job.id for job in jobs}
            if isinstance(error, Unavailable):
                self._failed(error, asked)
            raise
        if not admitted:
            self._forget(jobs)
            cost = sum(job.group.tokens for job in jobs)
            raise Overloaded(
                f"the queue holds {held} of {room} tokens and this request needs {cost} more",
                retry_after=self.pace.seconds(min(held + cost - room, held)),
            )
        for entry in entries:
            entry.admitted = True
        return [entry.answer for entry in entries]

    async def abandon(self, job_ids: Sequence[str]) -> None:
        """Does not wait long for a Redis that is away: it is told later."""
        left = [self._waiting.pop(job_id) for job_id in job_ids if job_id in self._waiting]
        if not left:
            return
        for entry in left:
            entry.answer.cancel()
            metrics.ABANDONED_TOTAL.inc()
        self._leaving |= {entry.job.id for entry in left}
        await asyncio.wait([asyncio.create_task(self._tell_who_left())], timeout=self._beat / 2)

    async def close(self) -> None:
        self._closed = True

    async def leave(self) -> None:
        """Abandons what is still open and goes; call it when the last caller is answered and its loops have ended."""
        await self.close()
        await self.abandon(list(self._waiting))
        try:
            await self._redis("DEL", self._keys.alive(self.replica), self._keys.replies(self.replica))
        except Unavailable as error:  # they expire by themselves
            self._failed(error)

    async def _send(self, jobs: Sequence[Job], max_tokens: int) -> tuple[bool, int]:
        args: list[Arg] = [max_tokens, FORGOTTEN_S]
        for job in jobs:
            args += (
                1 if job.priority == "interactive" else 2,
                job.id,
                job.group.tokens,
                self.replica,
                codec.encode(job),
            )
        admitted, held = await self._redis.script(scripts.SUBMIT, self._keys.book, args)
        return bool(admitted), int(held)

    async def _tell_who_left(self) -> None:
        leaving = sorted(self._leaving)
        asked = self._outage.now()
        try:
            if leaving:
                args = [arg for job_id in leaving for arg in (job_id, 0, "")]
                await self._redis.script(scripts.SETTLE, self._keys.book, [GROUP, 0, 0, FORGOTTEN_S, *args])
                self._leaving.difference_update(leaving)
        except Unavailable as error:
            self._failed(error, asked)

    async def live(self) -> None:
        """One sign of life; and where Redis may have forgotten something of ours, a reconciliation. A Redis that is
        away learns of it next time.
        """
        asked = self._outage.now()
        try:
            await self._live()
        except Unavailable as error:
            self._failed(error, asked)

    async def _live(self) -> None:
        keys = [
            *self._keys.book,
            self._keys.alive(self.replica),
            self._keys.workers,
            self._keys.dead,
            self._keys.served,
        ]
        args: list[Arg] = [math.ceil(self._ttl * 1000), GROUP, FORGOTTEN_S]
        beat = await self._redis.script(scripts.BEAT, [*keys, *self._keys.lasting], args)
        lived, served, jobs, tokens, done, workers, letters, *streams = beat
        self._observe(tokens, done)
        self.workers = workers
        if workers and served and served.decode() != self._keys.backbone:
            self._move(served.decode())
        if not lived or self._suspect:
            await self._reconcile()
            self._suspect = False
        await self._tell_who_left()
        self._outage.ended()
        there, claimed, there_bulk, claimed_bulk = streams
        pairs = ((there - claimed, claimed), (there_bulk - claimed_bulk, claimed_bulk))
        self._seen(Beat(jobs, tokens, workers, letters, pairs))

    def _move(self, served: str) -> None:
        """The queue is served with another backbone: what waits for the former one is refused, so that nobody gets an
        answer of both.
        """
        logs.event(LOG, "queue_moved", replica=self.replica, backbone=served, jobs=len(self._waiting))
        self._keys = self._keys.of(served)
        waiting, self._waiting = self._waiting, {}
        for job_id, entry in waiting.items():
            if not entry.answer.done():
                entry.answer.set_result(Failed(job_id, Unavailable.code, MOVED))

    def give_up(self, code: str, message: str) -> None:
        """Answers interactive jobs that wait with an error; Redis learns that nobody waits once it is back. Bulk jobs
        have the time to wait for that.
        """
        left = {job_id: w for job_id, w in self._waiting.items() if w.admitted and w.job.priority == "interactive"}
        self._leaving |= left.keys()
        for job_id, entry in left.items():
            del self._waiting[job_id]
            if not entry.answer.done():
                entry.answer.set_result(Failed(job_id, code, message))

    async def _reconcile(self) -> None:
        """Sends again what we wait for and Redis neither has nor has answered.

        A job leaves ``open`` and enters our replies in one script; so what is not open now, and not among the replies
        after that, is lost.
        """
        ids = [job_id for job_id, entry in self._waiting.items() if entry.admitted]
        places = await self._redis("HMGET", self._keys.book[0], *ids) if ids else []
        missing = [job_id for job_id, place in zip(ids, places, strict=True) if place is None]
        while missing and await self.receive():
            pass
        lost = [self._waiting[job_id].job for job_id in missing if job_id in self._waiting]
        if lost:
            logs.event(LOG, "jobs_resubmitted", replica=self.replica, jobs=len(lost))
            metrics.RESUBMITTED_TOTAL.inc(len(lost))
            await self._send(lost, UNBOUNDED)

    async def receive(self, block: int | None = None) -> int:
        """Hands out the answers that have come, and deletes them; their number. Reading one twice changes nothing.
        With ``block`` it waits so many milliseconds for the first one.

        Raises:
            Unavailable: Redis is away.
        """
        stream = self._keys.replies(self.replica)
        waiting = () if block is None else ("BLOCK", block)
        found = await self._redis("XREAD", "COUNT", 512, *waiting, "STREAMS", stream, "0")
        entries = found[0][1] if found else []
        for _, reply in entries:
            self._answer(reply[b"o"])
        if entries:
            await self._redis("XDEL", stream, *(entry for entry, _ in entries))
        return len(entries)

    def _answer(self, data: bytes) -> None:
        try:
            reply = codec.decode_reply(data)
        except codec.Unreadable as error:
            logs.event(LOG, "unreadable_reply", reason=str(error))
            return
        if isinstance(reply, Piece | Ended):
            told = self._waiting.get(reply.job_id)
            if told is not None and told.hear is not None and not told.answer.done():
                told.hear(reply)
            return
        entry = self._waiting.pop(reply.job_id, None)
        if entry is not None and not entry.answer.done():
            entry.answer.set_result(reply)

    def _forget(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self._waiting.pop(job.id, None)

    def _failed(self, error: Unavailable, asked: float | None = None) -> None:
        self._suspect = True
        if isinstance(error, Full):  # it answers, and answering jobs empties it
            return
        self._outage.began(error, asked)

    def _observe(self, tokens: int, done: int) -> None:
        now = self._clock()
        if self._done is not None and self._held:
            self.pace.settled(max(0, done - self._done), now)
        else:
            self.pace.start(now)
        self._done, self._held = done, tokens
