"""A worker's side of the queue in Redis: claim, keep the claims, answer; take over from the dead."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import socket
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from inward import codec, logs, metrics
from inward.errors import InternalError, Unavailable
from inward.queues.base import Closed
from inward.queues.redis import redelivery, scripts
from inward.queues.redis.outage import Outage
from inward.queues.redis.producer import MOST_PIECES, MOST_REPLIES, REPLIES_S
from inward.stores.connection import Arg, Connection, GroupLost
from inward.stores.keys import FORGOTTEN_S, GROUP, Keys
from inward.types import Failed, Job, News, Outcome

LOG = logs.logger("queues.redis")
MOST_LETTERS = 10_000
"""Dead letters kept; the oldest go first."""
INHERIT_S = 1.0
"""Between two looks for jobs of workers that are gone."""
NOBODY = "nobody"
"""Has what was released until somebody takes it: a worker that is always gone."""
BULK_FIRST = 8
"""In one of so many rounds bulk jobs go first, so that they don't starve."""
T = TypeVar("T")


class RedisConsumer:
    """One worker. What Redis can't take now is kept and tried again, so that a Redis that comes back finds everything
    done.

    Args:
        connection: owned by the caller, who closes it after ``leave``.
        keys: of the queue.
        idle: seconds without renewal after which a claim may be taken over; renewed at a third of it.
        max_deliveries: workers that a job may end before it is given up.
        about: who this worker is, as bytes for whoever looks at ``Keys.worker``; asked at every sign of life.
        ttl: seconds without a sign of life after which this worker counts as gone, and its claims are for others.
        wait: seconds of one wait for jobs.
        clock: monotonic seconds.
        outage: what is known of this Redis.
    """

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        *,
        idle: float = 30.0,
        max_deliveries: int = 3,
        about: Callable[[], bytes] = lambda: b"",
        ttl: float = 10.0,
        wait: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        outage: Outage | None = None,
    ) -> None:
        self.worker = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.refused: str | None = None
        """Why this worker may take no jobs: the queue is served with another backbone."""
        self.welcome = asyncio.Event()
        """Set while this worker is known and may take jobs."""
        self._redis, self._keys = connection, keys
        self._outage = outage or Outage(worker=self.worker)
        self._idle, self._ttl, self._wait, self._max_deliveries = idle, ttl, wait, max_deliveries
        self._about, self._clock = about, clock
        self._claims: dict[str, Job] = {}  # taken and neither settled nor lost
        self._held: deque[Job] = deque()  # claimed and not yet given to the worker
        self._orphans: set[str] = set()  # jobs in hand whose former workers died
        self._forgetful = False  # Redis may have given us jobs that never arrived
        self._inherit_at = self._reclaim_at = 0.0
        self._tokens_per_job = 256.0
        self._rounds = 0
        self._closed = False

    @property
    def away(self) -> str | None:
        """Why Redis is not to be had; None while it is."""
        return self._outage.reason

    @property
    def claimed(self) -> set[str]:
        """Ids of the jobs that were taken and are neither settled nor lost."""
        return set(self._claims)

    @property
    def lost(self) -> str | None:
        """As a producer's."""
        return None

    @property
    def problem(self) -> str | None:
        """Why no jobs are taken."""
        return self.away or self.refused or (None if self.welcome.is_set() else "waiting for Redis")

    async def open(self) -> None:
        """Makes the worker known. Waits for a Redis that is away or refuses us."""
        await self._until_there(self._join)
        await self._until_there(self.publish)

    async def keep(self) -> None:
        """``open``, and keeps the worker and its claims alive for good. Has to run as long as the worker does."""
        await self.open()
        while True:
            await asyncio.sleep(min(self._idle, self._ttl) / 3)
            await self.live()

    async def live(self) -> None:
        """One sign of life, and of every claim. A Redis that is away learns of it next time."""
        asked = self._outage.now()
        try:
            await self._renew()
            await self.publish()
        except Unavailable as error:
            self._failed(error, asked)

    async def take(self, tokens: int) -> list[Job]:
        while True:
            if not self._closed:
                await self.welcome.wait()
            if jobs := await self.look(tokens):
                return jobs
            if self._closed:
                raise Closed

    async def look(self, tokens: int) -> list[Job]:
        """What ``take`` would give now, after a moment's wait; perhaps nothing."""
        if not self._closed and self.refused is None:
            if self._forgetful:
                await self._until_there(self._recall)
            if orphans := await self._until_there(self._reclaim):
                return orphans
            await self._until_there(lambda: self._fetch(tokens))
        if self._held:
            return self._first(tokens)
        self._forgetful = True  # nothing to do: a good moment to look
        return []

    async def wanted(self, jobs: Sequence[Job]) -> list[Job]:
        """Asks Redis: a claim may be lost, a job abandoned, a replica dead."""
        jobs = [job for job in jobs if job.id in self._claims]
        if not jobs:
            return []
        replicas, number = _numbered(job.reply_to for job in jobs)
        keys = [*self._keys.book, *(self._keys.alive(replica) for replica in replicas)]
        args = [arg for job in jobs for arg in (job.id, number[job.reply_to])]
        flags = await self._until_there(lambda: self._redis.script(scripts.WANTED, keys, [GROUP, self.worker, *args]))
        for job, flag in zip(jobs, flags, strict=True):
            if not flag:
                self._drop(job.id)
                metrics.ABANDONED_TOTAL.inc()
        return [job for job, flag in zip(jobs, flags, strict=True) if flag]

    async def tell(self, news: News) -> bool:
        """Does not wait for a Redis that is away: what follows tells this, too."""
        job = self._claims.get(news.job_id)
        if job is None:
            return False
        keys = [*self._keys.book, self._keys.replies(job.reply_to), self._keys.alive(job.reply_to)]
        args: list[Arg] = [GROUP, self.worker, MOST_PIECES, REPLIES_S, job.id, codec.encode(news)]
        try:
            return bool(await self._redis.script(scripts.TELL, keys, args))
        except Unavailable:
            return False

    async def settle(self, outcomes: Sequence[Outcome]) -> None:
        claimed = [(self._claims[o.job_id], codec.encode(o)) for o in outcomes if o.job_id in self._claims]
        if not claimed:
            return
        replicas, number = _numbered(job.reply_to for job, _ in claimed)
        keys = [*self._keys.book, *(key for r in replicas for key in (self._keys.replies(r), self._keys.alive(r)))]
        args = [arg for job, data in claimed for arg in (job.id, number[job.reply_to], data)]
        kept = (MOST_REPLIES, REPLIES_S, FORGOTTEN_S)
        await self._until_there(lambda: self._redis.script(scripts.SETTLE, keys, [GROUP, *kept, *args]))
        for job, _ in claimed:
            self._drop(job.id)

    async def release(self, jobs: Sequence[Job], reason: str) -> None:
        """Any worker may take them over at once; since they may be what ended this engine, they are run alone there."""
        ids = [job.id for job in jobs if job.id in self._claims]
        if ids:
            logs.event(LOG, "jobs_released", worker=self.worker, jobs=len(ids), reason=reason)
            keys = [*self._keys.book, self._keys.gone]
            args: list[Arg] = [GROUP, self.worker, NOBODY, FORGOTTEN_S, *ids]
            await self._until_there(lambda: self._redis.script(scripts.RELEASE, keys, args))
        for job_id in ids:
            self._drop(job_id)

    async def close(self) -> None:
        """No more are taken by this worker; those that wait in Redis are for others, or for its successor."""
        self._closed = True
        self.welcome.set()  # nobody waits to be let in any more

    async def leave(self) -> None:
        """Gives back what is left and goes; call it after ``close``, when the worker's loop and ``keep`` have ended."""
        await self.close()
        try:
            if self._claims:
                await self._redis.script(scripts.REQUEUE, self._keys.book, [GROUP, self.worker, *self._claims])
            keys = [self._keys.served, self._keys.workers, self._keys.worker(self.worker), self._keys.gone]
            await self._redis.script(scripts.LEAVE, keys, [self._keys.backbone, self.worker, FORGOTTEN_S])
        except Unavailable as error:  # what is left is taken over once it is idle
            self._failed(error)

    # Taking. A job is held from the moment that it is claimed: Redis may go away at the next command.

    def _room(self, tokens: int) -> int:
        """What is missing to ``tokens`` of held jobs."""
        return tokens - sum(job.group.tokens for job in self._held)

    def _first(self, tokens: int) -> list[Job]:
        taken = [self._held.popleft()]
        spent = taken[0].group.tokens
        while self._held and spent + self._held[0].group.tokens <= tokens:
            taken.append(self._held.popleft())
            spent += taken[-1].group.tokens
        return taken

    async def _fetch(self, tokens: int) -> None:
        """Waiting jobs, interactive ones first, until about ``tokens`` are held. Waits a moment for some only if
        none are.
        """
        self._rounds += 1
        order = self._keys.streams if self._rounds % BULK_FIRST else self._keys.streams[::-1]
        for stream in order:
            while (room := self._room(tokens)) > 0:
                count = self._jobs_in(room)
                if await self._read([stream], count) < count:  # no more are there
                    break
        if not self._held and self._wait:
            wait = min(self._wait, max(0.01, min(self._inherit_at, self._reclaim_at) - self._clock()))
            await self._read(self._keys.streams, self._jobs_in(tokens), block=self._redis.block_ms(1000 * wait))

    def _jobs_in(self, tokens: int) -> int:
        """How many jobs to ask for; what is claimed beyond ``tokens`` is held for the next round."""
        return min(512, max(1, math.ceil(tokens / self._tokens_per_job)))

    async def _read(self, streams: Sequence[str], count: int, block: int | None = None) -> int:
        """How many entries came."""
        waiting = () if block is None else ("BLOCK", block)
        command = (
            "XREADGROUP",
            "GROUP",
            GROUP,
            self.worker,
            "COUNT",
            count,
            *waiting,
            "STREAMS",
            *streams,
            *(">" for _ in streams),
        )
        came = [(stream, *found) for stream, entries in await self._redis(*command) or () for found in entries]
        for stream, entry, fields in came:
            if not fields.keys() >= {b"id", b"to", b"job"}:
                logs.event(LOG, "entry_unreadable", severity=logging.ERROR, worker=self.worker)
                await self._redis("XACK", stream, GROUP, entry)
                await self._redis("XDEL", stream, entry)
            elif (job := await self._understood(fields, 1)) is not None:
                self._held.append(job)
                self._tokens_per_job += 0.1 * (job.group.tokens - self._tokens_per_job)
        return len(came)

    async def _recall(self) -> None:
        """Holds what Redis gave us while it went away, so that it never arrived."""
        found = await self._redis.script(scripts.RECALL, self._keys.book, [GROUP, self.worker])
        self._forgetful = False
        for deliveries, fields in _parsed(found):
            known = fields[b"id"].decode() in self._claims
            if not known and (job := await self._understood(fields, deliveries)) is not None:
                self._held.append(job)

    async def _reclaim(self) -> list[Job]:
        """Some jobs of workers that are gone, unless we have such ones in hand already."""
        self._orphans &= self._claims.keys()
        while not self._orphans and self._clock() >= min(self._inherit_at, self._reclaim_at):
            found = await self._orphaned()
            jobs: list[Job] = []
            try:
                for deliveries, fields in found:
                    metrics.REDELIVERED_TOTAL.inc()
                    job = await self._understood(fields, deliveries)
                    reason = redelivery.given_up(deliveries, self._max_deliveries)
                    if job is not None and reason is not None:
                        self._drop(job.id)
                        await self._bury(job.id, job.reply_to, deliveries, reason)
                    elif job is not None:
                        logs.event(LOG, "job_taken_over", job=job.id, deliveries=deliveries)
                        jobs.append(job)
            except BaseException:
                self._held += jobs
                raise
            self._orphans = {job.id for job in jobs}
            if jobs:
                return jobs
        return []

    async def _orphaned(self) -> list[tuple[int, dict[bytes, bytes]]]:
        """Deliveries and fields of jobs whose worker is gone; and, less often, of those whose claim was not renewed for
        long, whatever became of theirs.
        """
        most: list[Arg] = [redelivery.AT_ONCE, max(2, self._max_deliveries)]  # from that many on a job is a suspect
        if self._clock() >= self._inherit_at:
            keys = [*self._keys.book, self._keys.workers, self._keys.gone]
            args: list[Arg] = [GROUP, self.worker, *most, FORGOTTEN_S]
            if found := _parsed(await self._redis.script(scripts.INHERIT, keys, args)):
                return found
            self._inherit_at = self._clock() + INHERIT_S
        if self._clock() >= self._reclaim_at:
            args = [GROUP, self.worker, math.ceil(self._idle * 1000), *most]
            if found := _parsed(await self._redis.script(scripts.RECLAIM, self._keys.book, args)):
                return found
            self._reclaim_at = self._clock() + self._idle / 3
        return []

    async def _understood(self, fields: dict[bytes, bytes], deliveries: int) -> Job | None:
        """The job of an entry, now claimed; None for one that can't be read, which becomes a dead letter."""
        job_id, replica = fields[b"id"].decode(), fields[b"to"].decode()
        try:
            job = replace(
                codec.decode_job(fields[b"job"]),
                id=job_id,
                reply_to=replica,
                deliveries=deliveries,
                alone=redelivery.alone(deliveries, self._max_deliveries),
            )
        except codec.Unreadable as error:
            await self._bury(job_id, replica, deliveries, str(error))
            return None
        if job.id not in self._claims:
            metrics.CLAIMED_JOBS.inc()
        self._claims[job.id] = job
        return job

    async def _bury(self, job_id: str, replica: str, deliveries: int, reason: str) -> None:
        logs.event(LOG, "job_given_up", job=job_id, deliveries=deliveries, reason=reason)
        outcome = codec.encode(Failed(job_id, InternalError.code, f"this item could not be scored: {reason}"))
        keys = [*self._keys.book, self._keys.dead, self._keys.replies(replica), self._keys.alive(replica)]
        args: list[Arg] = [GROUP, self.worker, MOST_LETTERS, FORGOTTEN_S, job_id, reason, deliveries, outcome]
        args += (MOST_REPLIES, REPLIES_S, self._keys.backbone)
        if await self._redis.script(scripts.BURY, keys, args):
            metrics.DEAD_LETTERS_TOTAL.inc()

    def _drop(self, job_id: str) -> None:
        if self._claims.pop(job_id, None) is not None:
            metrics.CLAIMED_JOBS.dec()

    # Staying alive

    async def _renew(self) -> None:
        ids = list(self._claims)
        if not ids:
            return
        for job_id, kept in zip(
            ids, await self._redis.script(scripts.RENEW, self._keys.book, [GROUP, self.worker, *ids]), strict=True
        ):
            if kept > 0 or job_id not in self._claims:
                continue
            if kept < 0:
                metrics.CLAIMS_LOST_TOTAL.inc()
            self._drop(job_id)
        self._held = deque(job for job in self._held if job.id in self._claims)

    async def _join(self) -> None:
        """The consumer group is there; those of its members that left long ago are forgotten."""
        for stream in self._keys.streams:
            await self._redis.ensure_group(stream, GROUP)
            await self._redis.script(scripts.DISMISS, [stream], [GROUP, 3_600_000])

    async def publish(self) -> None:
        """Gives a sign of life, with ``about`` as it is now; ``refused`` says whether it was taken."""
        ours = self._keys.backbone
        keys = [self._keys.served, self._keys.workers, self._keys.worker(self.worker), self._keys.gone]
        args: list[Arg] = [ours, self.worker, math.ceil(self._ttl * 1000), self._about(), FORGOTTEN_S]
        served = (
            await self._redis.script(scripts.ENLIST, [*keys, *self._keys.lasting, *self._keys.book], args)
        ).decode()
        self._there()
        if served == ours:
            self.refused = None
            self.welcome.set()
            return
        if self.refused is None:
            logs.event(LOG, "worker_refused", severity=logging.ERROR, worker=self.worker, served=served, ours=ours)
        self.refused = (
            f"the queue {self._keys.name!r} is served with other weights, dtype or template ({served}; ours: {ours}): "
            "give all workers of a queue the same --model, --revision, --dtype and --template, or this one a --queue "
            "of its own"
        )
        if not self._closed:
            self.welcome.clear()

    async def _until_there(self, call: Callable[[], Awaitable[T]]) -> T:
        """``call``, again and again while Redis is away or full, refuses us, or has lost the group."""
        pause = 0.05
        while True:
            asked = self._outage.now()
            try:
                result: T = await call()
                if self._redis.answered >= asked:  # it may not have been asked
                    self._there()
                return result
            except Unavailable as error:
                self._failed(error, asked)
                await asyncio.sleep(pause)
                pause = min(2 * pause, 1.0)
                if isinstance(error, GroupLost):
                    await self._until_there(self._join)

    def _failed(self, error: Unavailable, asked: float | None = None) -> None:
        if isinstance(error, GroupLost):  # it answers, and began anew
            logs.event(LOG, "group_lost", severity=logging.WARNING, worker=self.worker)
        else:
            self._outage.began(error, asked)
        self._forgetful = True
        # others could give no sign of life and renew no claims either
        self._inherit_at, self._reclaim_at = self._clock() + self._ttl, self._clock() + self._idle

    def _there(self) -> None:
        self._outage.ended()


def _parsed(found: Sequence[tuple[int, Sequence[bytes]]]) -> list[tuple[int, dict[bytes, bytes]]]:
    """Deliveries and fields, which Lua gives as a flat list."""
    return [(deliveries, dict(zip(flat[::2], flat[1::2], strict=True))) for deliveries, flat in found]


def _numbered(replicas: Iterable[str]) -> tuple[list[str], dict[str, int]]:
    """The replicas without repeats, and the number of each, from 1."""
    order = dict.fromkeys(replicas)
    return list(order), {replica: i for i, replica in enumerate(order, 1)}
