"""Several Redis servers as one queue. A job goes to the shard of its prompt and is settled where it was taken. When one
is away the other shards go on, and take its jobs as far as they have room to spare.

The first shard is the home of all that is no job: who works here, heads and policies that are switched, requests to
workers, idempotency, quotas, bulk jobs, score streams. Which shard a prompt has follows from the number of shards
alone, so a new one goes to the end of the list. Replicas that disagree on the list for a while share less work and lose
nothing, as long as workers take from every shard that any replica knows.
"""

from __future__ import annotations

import asyncio
import hashlib
import struct
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Generic, TypeVar

from inward import metrics
from inward.errors import Overloaded, ShardAway, Unavailable
from inward.queues.base import Closed, Hear
from inward.queues.redis.consumer import RedisConsumer
from inward.queues.redis.outage import Outage
from inward.queues.redis.producer import Beat, RedisProducer, door, show
from inward.stores.connection import Connection
from inward.stores.keys import Keys
from inward.types import Failed, Ids, Job, News, Outcome

Side = TypeVar("Side", RedisProducer, RedisConsumer)
PATIENCE_S = 0.5
"""For which a worker waits for a shard that does not answer, before it goes on with the others."""
NO_ROOM = "; the other shards have no room to spare for them"
SPARE = 0.5
"""Of a shard's room up to which it takes jobs of one that is away: its own come first."""
LEAVE_S = 3.0
"""For which a worker that leaves waits for a shard that is there and slow, so that what it computed is not lost."""


def shards_of(prompt_ids: Ids, shards: int) -> list[int]:
    """The shard of a prompt, and those that take its place one after the other, each where no shard before takes it.

    They stand in the order of the lots that they draw (rendezvous hashing, Thaler and Ravishankar 1996). So where a
    shard is added at the end just those prompts move that it draws, one in ``shards + 1``; and what a shard had is
    shared out among all others.
    """
    prompt = hashlib.blake2b(struct.pack(f"<{len(prompt_ids)}q", *prompt_ids), digest_size=16)

    def lot(shard: int) -> bytes:
        drawn = prompt.copy()
        drawn.update(shard.to_bytes(2, "little"))
        return drawn.digest()

    return sorted(range(shards), key=lot, reverse=True)


class _Sharded(Generic[Side]):
    """What both sides know of their shards: which are there, for the gauge and in words."""

    shards: Sequence[Side]

    def __init__(self, n: int) -> None:
        self._up = [1] * n

    @property
    def away(self) -> str | None:
        """Why no shard is to be had; None while any is."""
        reasons = [shard.away for shard in self.shards]
        return None if None in reasons else reasons[0]

    @property
    def lost(self) -> str | None:
        """Which shards are away while others are there."""
        reasons = [shard.away for shard in self.shards]
        away = [f"shard {self._name(i)} is away: {reason}" for i, reason in enumerate(reasons) if reason is not None]
        return "; ".join(away) if 0 < len(away) < len(reasons) else None

    def _outage(self, shard: int, before: str | None = None) -> Outage:
        def up(value: int) -> None:
            self._up[shard] = value
            metrics.REDIS_UP.set(min(self._up))

        return Outage(before, up, shard=self._name(shard))

    def _name(self, shard: int) -> str:
        return f"{shard + 1} of {len(self._up)}"


class _Placing:
    """Where the jobs of a request go, while it is found out which shards are there."""

    def __init__(self, shards: Sequence[RedisProducer], jobs: Sequence[Job]) -> None:
        self.errors: dict[int, Unavailable] = {}
        """Of the shards that could not be had."""
        self.lost: list[Job] = []
        """Jobs that no shard takes."""
        self._shards, self._left = shards, list(jobs)
        self._order = {job.id: shards_of(job.group.prompt_ids, len(shards)) for job in jobs}
        """Their own shard, and those that may take its place: without what was full."""

    def parts(self) -> dict[tuple[int, bool], list[Job]]:
        """The jobs that are to be submitted now, by shard, and whether that takes the place of their own."""
        parts: dict[tuple[int, bool], list[Job]] = {}
        for job in self._left:
            if (i := self._place(job)) is None:
                self.lost.append(job)
            else:
                parts.setdefault((i, i != self._order[job.id][0]), []).append(job)
        self._left = []
        return parts

    def refused(self, at: tuple[int, bool], part: Sequence[Job], error: BaseException) -> None:
        """Raises what nobody else can make good; otherwise the part goes on to the next in order."""
        i, moved = at
        if isinstance(error, Overloaded) and moved:
            for job in part:
                self._order[job.id].remove(i)
        elif isinstance(error, Unavailable) and not isinstance(error, Overloaded):
            self.errors[i] = error
        else:
            raise error
        self._left += part

    def reason(self, job: Job) -> tuple[int, Unavailable]:
        """The job's own shard, and what is wrong with it."""
        i = self._order[job.id][0]
        return i, self.errors[i]

    def _place(self, job: Job) -> int | None:
        own, *others = self._order[job.id]
        if own not in self.errors:
            return own
        if job.priority != "interactive":
            return None
        return next((i for i in others if i not in self.errors and self._is_there(i)), None)

    def _is_there(self, i: int) -> bool:
        return self._shards[i].away is None and self._shards[i].workers > 0


class ShardedProducer(_Sharded[RedisProducer]):
    """One API replica in front of several Redis servers.

    Args:
        connections: the shards, the home first; owned by the caller, who closes them after ``leave``.
        max_tokens: over all shards, each of which takes an equal part of it; a request that needs more than that part
            on one shard may have what the others leave of the whole.
        ttl: as a ``RedisProducer``'s; after as long without a shard those who wait for it are answered with a 503,
            since workers drop their jobs by then, too.
        more: as a ``RedisProducer``'s.
    """

    def __init__(
        self,
        connections: Sequence[Connection],
        keys: Keys,
        *,
        max_tokens: int,
        beat: float = 1.0,
        ttl: float = 10.0,
        **more: Any,
    ) -> None:
        super().__init__(len(connections))
        self._beats: dict[int, Beat] = {}
        self._max_tokens = max_tokens
        self._ttl = ttl
        self._beat = beat
        self._closed = False
        self.shards = [
            RedisProducer(
                connection, keys, max_tokens=-(-max_tokens // len(connections)), beat=beat, ttl=ttl,
                outage=self._outage(i, "Redis was not asked yet"), seen=self._seen(i), **more,
            )
            for i, connection in enumerate(connections)
        ]  # fmt: skip

    @property
    def served(self) -> str:
        """As the home shard is."""
        return self.shards[0].served

    @property
    def workers(self) -> int:
        """Of the shard that has most."""
        return max(shard.workers for shard in self.shards)

    @property
    def open_jobs(self) -> int:
        return sum(shard.open_jobs for shard in self.shards)

    async def live(self) -> None:
        """One sign of life to each."""
        await asyncio.gather(*(shard.live() for shard in self.shards))

    async def keep_living(self) -> None:
        """As a ``RedisProducer``'s, for all."""
        async with asyncio.TaskGroup() as group:
            for shard in self.shards:
                group.create_task(shard.keep_living())
            group.create_task(self._keep_giving_up())

    async def keep_receiving(self) -> None:
        """As a ``RedisProducer``'s, from all."""
        async with asyncio.TaskGroup() as group:
            for shard in self.shards:
                group.create_task(shard.keep_receiving())

    async def submit(self, jobs: Sequence[Job], hear: Hear | None = None) -> list[Awaitable[Outcome]]:
        """As the protocol says, of the shards that are there. Jobs of one that is not go together to the next that has
        room to spare for them. Where none has, they fail with ``ShardAway``, while the others of the request are done;
        those that have no other beside them are refused as a whole, and so are bulk jobs, which can wait and go nowhere
        else.
        """
        with door(self._closed):
            return await self._place(jobs, hear)

    async def abandon(self, job_ids: Sequence[str]) -> None:
        await asyncio.gather(*(shard.abandon(job_ids) for shard in self.shards))

    async def close(self) -> None:
        self._closed = True

    async def leave(self) -> None:
        """As a ``RedisProducer``'s."""
        await self.close()
        await asyncio.gather(*(shard.leave() for shard in self.shards))

    async def _place(self, jobs: Sequence[Job], hear: Hear | None) -> list[Awaitable[Outcome]]:
        placing = _Placing(self.shards, jobs)
        waits: dict[str, Awaitable[Outcome]] = {}
        try:
            while parts := placing.parts():
                asking = (
                    self.shards[i].place(part, hear, self._spare(i) if moved else self._room(i, part))
                    for (i, moved), part in parts.items()
                )
                results = await asyncio.gather(*asking, return_exceptions=True)
                for (at, part), result in zip(parts.items(), results, strict=True):
                    if isinstance(result, BaseException):
                        placing.refused(at, part, result)
                    else:
                        waits |= zip((job.id for job in part), result, strict=True)
            if placing.lost and (len(placing.lost) == len(jobs) or jobs[0].priority != "interactive"):
                raise self._refusal(placing)
        except BaseException:
            await self.abandon([job.id for job in jobs])
            raise
        waits |= {job.id: self._failed(placing, job) for job in placing.lost}
        return [waits[job.id] for job in jobs]

    def _room(self, i: int, jobs: Sequence[Job]) -> int:
        """Up to how many tokens its shard may hold with these: its part, or for those that would never fit in that,
        what the others leave of the whole.
        """
        share = self.shards[i].max_tokens
        if sum(job.group.tokens for job in jobs) <= share:
            return share
        return max(share, self._max_tokens - sum(beat.tokens for other, beat in self._beats.items() if other != i))

    def _spare(self, i: int) -> int:
        """Up to how many tokens its shard may hold with jobs of another."""
        return int(SPARE * self.shards[i].max_tokens)

    def _refusal(self, placing: _Placing) -> Unavailable:
        """What a request is refused with as a whole: with ``ShardAway`` only where some other shard is well."""
        i, error = placing.reason(placing.lost[0])
        if all(other in placing.errors or shard.away or not shard.workers for other, shard in enumerate(self.shards)):
            return error
        reason = error.message + (NO_ROOM if placing.lost[0].priority == "interactive" else "")
        return ShardAway(self._message(i, reason), retry_after=error.retry_after)

    def _failed(self, placing: _Placing, job: Job) -> Awaitable[Outcome]:
        answer: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        i, error = placing.reason(job)
        answer.set_result(Failed(job.id, ShardAway.code, self._message(i, error.message + NO_ROOM)))
        return answer

    def _message(self, i: int, reason: str) -> str:
        return f"shard {self._name(i)} of the queue is away, and this prompt's jobs go through it: {reason}"

    async def _keep_giving_up(self) -> None:
        while True:
            await asyncio.sleep(self._beat)
            for i, shard in enumerate(self.shards):
                if shard.away_for > self._ttl and (reason := shard.away):
                    code = ShardAway.code if self.away is None else Unavailable.code
                    shard.give_up(code, reason if self.away else self._message(i, reason))

    def _seen(self, i: int) -> Callable[[Beat], None]:
        def seen(beat: Beat) -> None:
            self._beats[i] = beat
            first, *others = self._beats.values()
            for other in others:
                first += other
            show(first)

        return seen


class ShardedConsumer(_Sharded[RedisConsumer]):
    """One worker that takes from several Redis servers, from each as much as from any other. What a shard that is away
    can't be told now is told when it is back, while the work goes on.

    Args:
        connections: the shards, the home first; owned by the caller, who closes them after ``leave``.
        about: as a ``RedisConsumer``'s; the home is told.
        more: as a ``RedisConsumer``'s.
    """

    def __init__(
        self, connections: Sequence[Connection], keys: Keys, *, about: Callable[[], bytes] = lambda: b"", **more: Any
    ) -> None:
        super().__init__(len(connections))
        self.shards = [
            RedisConsumer(
                connection, keys, about=(lambda: b"") if i else about, outage=self._outage(i), **more
            )
            for i, connection in enumerate(connections)
        ]  # fmt: skip
        self.home = self.shards[0]
        self.worker = self.home.worker
        self.welcome = self.home.welcome
        """The home shard says which backbone the queue is served with; nothing is taken from any before it has."""
        self._taking: dict[RedisConsumer, asyncio.Task[list[Job]]] = {}
        self._ended: set[RedisConsumer] = set()  # closed, and nothing is left of what they held
        self._late: dict[asyncio.Task[None], RedisConsumer] = {}  # what is still to be told, and to whom
        self._closed = False

    @property
    def problem(self) -> str | None:
        """Why no jobs are taken, or not from every shard that is there."""
        refused = next((shard.refused for shard in self.shards if shard.refused), None)
        return self.away or refused or (None if self.welcome.is_set() else "waiting for the first shard")

    async def keep(self) -> None:
        """As a ``RedisConsumer``'s, for all."""
        async with asyncio.TaskGroup() as group:
            for shard in self.shards:
                group.create_task(self._keep(shard))

    async def publish(self) -> None:
        """As a ``RedisConsumer``'s, at home."""
        await self.home.publish()

    async def take(self, tokens: int) -> list[Job]:
        """Each shard is asked for its part of ``tokens``, and asked again once what it gave was taken."""
        share = max(1, tokens // len(self.shards))
        while True:
            await self.welcome.wait()
            for shard in self.shards:
                if shard not in self._taking and shard not in self._ended:
                    self._taking[shard] = asyncio.create_task(shard.take(share))
            if not self._taking:
                raise Closed
            wait = PATIENCE_S if self._closed else None
            await asyncio.wait(self._taking.values(), timeout=wait, return_when=asyncio.FIRST_COMPLETED)
            if jobs := self._taken():
                return jobs
            if self._closed and all(shard.away for shard in self._taking):
                raise Closed

    async def wanted(self, jobs: Sequence[Job]) -> list[Job]:
        """Of a shard that is away all are, as far as anybody knows."""
        there = [shard for shard in self.shards if shard.away is None]
        asked = [asyncio.create_task(shard.wanted(jobs)) for shard in there]
        done, silent = await asyncio.wait(asked, timeout=PATIENCE_S) if asked else (set(), set())
        for task in silent:
            task.cancel()
        known = {job.id for task in done for job in task.result()}
        for shard, task in zip(there, asked, strict=True):
            known |= shard.claimed if task in silent else set()
        for shard in self.shards:
            known |= shard.claimed if shard not in there else set()
        return [job for job in jobs if job.id in known]

    async def tell(self, news: News) -> bool:
        return any([await shard.tell(news) for shard in self.shards if shard.away is None])

    async def settle(self, outcomes: Sequence[Outcome]) -> None:
        """Where the job was taken."""
        await self._tell_each(lambda shard: shard.settle(outcomes))

    async def release(self, jobs: Sequence[Job], reason: str) -> None:
        await self._tell_each(lambda shard: shard.release(jobs, reason))

    async def close(self) -> None:
        self._closed = True
        for shard in self.shards:
            await shard.close()

    async def leave(self) -> None:
        """As a ``RedisConsumer``'s. A shard that is slow is waited for a moment, one that is away is not."""
        if slow := [task for task, shard in self._late.items() if shard.away is None]:
            await asyncio.wait(slow, timeout=LEAVE_S)
        tasks = [*self._taking.values(), *self._late]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(shard.leave() for shard in self.shards))

    def _taken(self) -> list[Job]:
        """What shards gave since the last look."""
        jobs: list[Job] = []
        for shard, task in list(self._taking.items()):
            if task.done():
                del self._taking[shard]
                if isinstance(task.exception(), Closed):
                    self._ended.add(shard)
                else:
                    jobs += task.result()
        return jobs

    async def _keep(self, shard: RedisConsumer) -> None:
        if shard is not self.home:
            await self.welcome.wait()
        await shard.keep()

    async def _tell_each(self, tell: Callable[[RedisConsumer], Coroutine[Any, Any, None]]) -> None:
        """Does not wait long for one that does not answer: it is told when it does."""
        tasks = {asyncio.create_task(tell(shard)): shard for shard in self.shards}
        late = {task: shard for task, shard in tasks.items() if shard.away is not None}
        if there := tasks.keys() - late.keys():
            done, silent = await asyncio.wait(there, timeout=PATIENCE_S)
            late |= {task: tasks[task] for task in silent}
            for task in done:
                task.result()
        self._late |= late
        for task in late:
            task.add_done_callback(self._late.pop)
