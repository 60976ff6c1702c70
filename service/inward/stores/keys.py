"""Every key that Inward keeps in Redis, on one screen.

All keys of one queue share a hash tag, so that they live in one slot of a cluster and a script may touch several of
them at once. A queue belongs to one backbone at a time, and its jobs to that one for good: their keys bear its
fingerprint and dtype. Several queues may share a Redis.

    inward:{<queue>}:…

    backbone                  string  fingerprint:dtype that the queue is served with (TTL): workers of another one wait
    workers                   zset    worker → Unix milliseconds until which it counts as alive
    gone                      set     workers that gave no sign of life in time, or left, and may have claims left
    worker:<worker>           string  who that worker is (TTL): backbone, heads, limits
    alive:<replica>           string  there while the replica lives (TTL): nobody computes for the dead
    replies:<replica>         stream  outcomes for one API replica: o (``codec``) (TTL)

    <backbone>:jobs:interactive  stream  waiting and claimed jobs: id, to (replica), job (``codec``)
    <backbone>:jobs:bulk         stream  the same, for those that can wait
    <backbone>:open              hash    job id → "<stream 1|2> <entry> <tokens>", neither settled nor abandoned
    <backbone>:tokens            integer tokens of all open jobs: what admission looks at
    <backbone>:done              integer tokens settled since ever: what the pace is worked out from
    dead                         stream  jobs that ended k workers: id, to, job, reason, deliveries, queue, backbone

    requests                  stream  what one worker is to do (switch a head …): request, answer (key), until
    answer:<id>               list    the answer to a request (TTL)
    lock                      string  the worker that is changing the heads folder or the policy (TTL, renewed)
    policy                    string  the policy versions that were switched to, the newest last
    news                      stream  what all workers are to know: news

    answered:<key>            string  hash of a request and the answer to it, for its Idempotency-Key (TTL)
    quota:<caller>:<minute>   integer tokens that a key (its hash) used (TTL)
    bulk:<job>                hash    a bulk job: state, kind, head, rows, chunks, created, scores, caller (TTL)
    bulk:<job>:rows           hash    chunk → its rows, as long as it is not done
    bulk:<job>:results        hash    chunk → its results
    chunks                    stream  chunks to be done: job, chunk
    scores:<name>             stream  scored rows for trainers: row (JSON) (bounded, TTL)

A job is in ``open`` exactly as long as its entry is in a stream: both change in one script (``scripts``), so no crash
separates them and the count of tokens can't leak. Nothing here lives without an end: what has no TTL of its own is
forgotten ``FORGOTTEN_S`` after the last sign of life of a worker or a replica.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

GROUP = "workers"
"""The one consumer group of the job streams."""
FORGOTTEN_S = 7 * 86400
"""What a queue without workers and replicas is kept for."""


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of the queue called ``name``; those of its jobs are for ``backbone`` alone."""

    name: str
    backbone: str = ""

    def __post_init__(self) -> None:
        if not self.name or set(self.name) & set("{}"):
            raise ValueError(f"a queue's name must not be empty or have braces in it: {self.name!r}")

    def of(self, backbone: str) -> Keys:
        """The same queue, served with ``backbone``."""
        return replace(self, backbone=backbone)

    def key(self, *parts: str) -> str:
        """``inward:{<queue>}:<part>:<part>…``"""
        return ":".join((f"inward:{{{self.name}}}", *parts))

    def job_key(self, *parts: str) -> str:
        """``inward:{<queue>}:<backbone>:<part>…``"""
        return self.key(*((self.backbone,) if self.backbone else ()), *parts)

    @property
    def streams(self) -> tuple[str, str]:
        """Interactive, bulk; scripts number them 1 and 2."""
        return self.job_key("jobs", "interactive"), self.job_key("jobs", "bulk")

    @property
    def book(self) -> tuple[str, str, str, str, str]:
        """What the scripts keep in step: open, tokens, done and the two job streams, in this order."""
        return self.job_key("open"), self.job_key("tokens"), self.job_key("done"), *self.streams

    @property
    def served(self) -> str:
        """Which backbone the queue is served with."""
        return self.key("backbone")

    @property
    def lasting(self) -> tuple[str, ...]:
        """What has no TTL of its own and belongs to nobody: workers and replicas put its end off."""
        return self.dead, self.requests, self.policy, self.news, self.chunks

    @property
    def workers(self) -> str:
        return self.key("workers")

    @property
    def gone(self) -> str:
        return self.key("gone")

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

    @property
    def chunks(self) -> str:
        return self.key("chunks")

    @property
    def lock(self) -> str:
        return self.key("lock")

    def worker(self, worker: str) -> str:
        return self.key("worker", worker)

    def alive(self, replica: str) -> str:
        return self.key("alive", replica)

    def replies(self, replica: str) -> str:
        return self.key("replies", replica)

    def answer(self, request: str) -> str:
        return self.key("answer", request)

    def answered(self, key: str) -> str:
        return self.key("answered", key)

    def quota(self, caller: str, minute: int) -> str:
        return self.key("quota", caller, str(minute))

    def bulk(self, job: str, *part: str) -> str:
        return self.key("bulk", job, *part)

    def scores(self, name: str) -> str:
        return self.key("scores", name)
