"""Every key that Inward keeps in Redis, on one screen.

All keys of one queue share a hash tag, so that they live in one slot of a cluster and a script may touch several of
them at once. A queue belongs to one backbone; several queues may share a Redis.

    inward:{<queue>}:jobs:interactive   stream  waiting and claimed jobs: id, to (replica), job (``codec``)
    inward:{<queue>}:jobs:bulk          stream  the same, for those that can wait
    inward:{<queue>}:open               hash    job id → "<stream 1|2> <entry> <tokens>": admitted and neither settled
    nor abandoned inward:{<queue>}:tokens             integer tokens of all open jobs: what admission looks at
    inward:{<queue>}:done               integer tokens settled since ever: what the pace is worked out from
    inward:{<queue>}:replies:<replica>  stream  outcomes for one API replica: o (``codec``)
    inward:{<queue>}:alive:<replica>    string  there while the replica lives (TTL): nobody computes for the dead
    inward:{<queue>}:workers            zset    worker → Unix milliseconds until which it counts as alive
    inward:{<queue>}:worker:<worker>    string  who that worker is (TTL): backbone, heads, limits
    inward:{<queue>}:requests           stream  what one worker is to do (switch a head …): request, answer (key), until
    inward:{<queue>}:answer:<id>        list    the answer to a request (TTL) inward:{<queue>}:lock               string
    the worker that is changing the heads folder or the policy (TTL) inward:{<queue>}:policy             string  the
    policy versions that were switched to, the newest last inward:{<queue>}:news               stream  what all workers
    are to know: news inward:{<queue>}:answered:<key>     string  hash of a request and the answer to it, for its
    Idempotency-Key (TTL) inward:{<queue>}:quota:<caller>:<minute>  integer tokens that a key (its
    hash) used (TTL) inward:{<queue>}:bulk:<job>         hash    a bulk job: state, kind, head, rows, chunks, created,
    scores (TTL, as are the next two) inward:{<queue>}:bulk:<job>:rows    hash    chunk → its rows, as long as it is not
    done inward:{<queue>}:bulk:<job>:results hash    chunk → its results inward:{<queue>}:chunks             stream
    chunks to be done: job, chunk inward:{<queue>}:scores:<name>      stream  scored rows for trainers: row (JSON)
    (bounded, TTL) inward:{<queue>}:dead               stream  jobs that ended k workers: id, to, job, reason,
    deliveries, queue

A job is in ``open`` exactly as long as its entry is in a stream: both change in one script (``scripts``), so no crash
separates them and the count of tokens can't leak.
"""

from __future__ import annotations

from dataclasses import dataclass

GROUP = "workers"
"""The one consumer group of the job streams."""


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of the queue called ``name``; those of the house above it."""

    name: str

    def __post_init__(self) -> None:
        if not self.name or set(self.name) & set("{}"):
            raise ValueError(f"a queue's name must not be empty or have braces in it: {self.name!r}")

    def key(self, *parts: str) -> str:
        """``inward:{<queue>}:<part>:<part>…``"""
        return ":".join((f"inward:{{{self.name}}}", *parts))

    @property
    def streams(self) -> tuple[str, str]:
        """Interactive, bulk; scripts number them 1 and 2."""
        return self.key("jobs", "interactive"), self.key("jobs", "bulk")

    @property
    def book(self) -> tuple[str, str, str, str, str]:
        """What the scripts keep in step: open, tokens, done and the two job streams, in this order."""
        return self.key("open"), self.key("tokens"), self.key("done"), *self.streams

    @property
    def workers(self) -> str:
        return self.key("workers")

    @property
    def requests(self) -> str:
        return self.key("requests")

    @property
    def policy(self) -> str:
        return self.key("policy")

    @property
    def news(self) -> str:
        return self.key("news")

    @property
    def dead(self) -> str:
        return self.key("dead")

    def worker(self, worker: str) -> str:
        return self.key("worker", worker)

    def replies(self, replica: str) -> str:
        return self.key("replies", replica)

    def bulk(self, job: str, *part: str) -> str:
        return self.key("bulk", job, *part)

    @property
    def chunks(self) -> str:
        return self.key("chunks")

    def scores(self, name: str) -> str:
        return self.key("scores", name)

    def answered(self, key: str) -> str:
        return self.key("answered", key)

    def quota(self, caller: str, minute: int) -> str:
        return self.key("quota", caller, str(minute))

    def alive(self, replica: str) -> str:
        return self.key("alive", replica)
