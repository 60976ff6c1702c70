"""``inward api``: talks HTTP, owns no model, and meets its workers in a Redis."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from redis.exceptions import RedisError

from inward import __version__, logs, metrics
from inward.api.app import create_app
from inward.api.auth import KeyRing
from inward.api.bulk import BulkRunner
from inward.api.services import Services
from inward.control.channel import ControlChannel
from inward.control.remote import RemoteHeadControl, RemotePolicyControl
from inward.intake import Intake
from inward.processes.wiring import (
    ModelFiles,
    about,
    connect,
    find_model,
    key_ring,
    limits,
    open_prompts,
    tokenizer_hash,
)
from inward.queues.redis.producer import RedisProducer
from inward.queues.single_flight import SingleFlight
from inward.settings import Settings
from inward.stores.connection import Connection
from inward.stores.idempotency import RedisIdempotencyStore
from inward.stores.jobs import BulkStore
from inward.stores.keys import Keys
from inward.stores.leases import LeaseWatch, RedisLeases
from inward.stores.quota import RedisQuota
from inward.stores.score_streams import ScoreStreams

LOG = logs.logger("processes")
LOOK_INTERVAL_S = 1.0
"""Between two looks of a replica at what its workers say of themselves."""
UNKNOWN_TOKENS = 2**31
"""How long a text may be, until a worker has said it."""


class ApiProcess:
    """Everything one process of ``inward api`` holds."""

    def __init__(self, settings: Settings, model: ModelFiles, connection: Connection) -> None:
        self.settings = settings
        self.draining = False
        self._connection = connection
        self.queue_name = settings.queue or model.name
        keys = Keys(self.queue_name)
        beat = min(1.0, settings.presence / 3)
        self._queue = RedisProducer(
            connection, keys, max_tokens=settings.queue_tokens, ttl=settings.presence, beat=beat
        )
        self._prompts = open_prompts(settings, model, UNKNOWN_TOKENS)
        self.head_control = RemoteHeadControl(
            ControlChannel(connection, keys), template=self._prompts.template, tokenizer=tokenizer_hash(model)
        )
        store = BulkStore(connection, keys, keep=settings.bulk_keep, idle=settings.claim_idle)
        self.services = Services(
            prompts=self._prompts,
            jobs=store,
            scores=ScoreStreams(connection, keys, keep=settings.bulk_keep),
            intake=Intake(
                SingleFlight(
                    self._queue,
                    window=settings.sharing_window,
                    current=self.head_control.current,
                    watch=self._watch(keys),
                )
            ),
            heads=self.head_control,
            policies=RemotePolicyControl(self.head_control),
            model=model.name,
            info=self.info,
            limits=limits(settings, self._prompts.max_tokens),
            keys=key_ring(settings),
            rerank_head=settings.rerank_head,
            compat_head=settings.compat_head,
            metrics_open=settings.metrics_open,
            ready=self.ready,
            alive=lambda: not self._looking.done(),
            quota=RedisQuota(connection, keys, settings.quota) if settings.quota else None,
            idempotency=RedisIdempotencyStore(
                connection, keys, keep=settings.idempotency_window, running=settings.timeout + 30
            ),
        )
        self.app = create_app(self.services)
        metrics.BUILD_INFO.labels(version=__version__, role="api").set(1)
        inside = replace(self.services, intake=Intake(self._queue, priority="bulk"), keys=KeyRing())
        self._bulk = asyncio.create_task(BulkRunner(store, create_app(inside), idle=settings.claim_idle).run())
        self._looking = asyncio.create_task(self._look())

    @classmethod
    async def open(cls, settings: Settings) -> ApiProcess:
        """Loads the tokenizer and meets Redis; a Redis or workers that are away are waited for, while ``ready`` says
        so.

        Raises:
            SetupError: something does not fit; nothing is left open.
        """
        connection = connect(settings)
        try:
            await connection.check()
            front = cls(settings, find_model(settings, weights=False), connection)
        except BaseException:
            await connection.close()
            raise
        await front._queue.open()
        return front

    def _watch(self, keys: Keys) -> LeaseWatch | None:
        """What is computed once for all replicas; without a window, each replica shares only among those who wait in
        it.
        """
        window = self.settings.sharing_window
        if not window:
            return None
        running = self.settings.timeout + 30
        elsewhere = RedisLeases(self._connection, keys, window=window, running=running, away=lambda: self._queue.away)
        return LeaseWatch(elsewhere, current=self.head_control.current)

    async def _look(self) -> None:
        """Keeps an eye on the workers."""
        while True:
            try:
                await self.head_control.refresh()
                if self.head_control.workers:
                    shortest = min(worker_info.max_tokens for worker_info in self.head_control.workers.values())
                    self._prompts.max_tokens = min(shortest, self.settings.max_tokens or shortest)
            except (RedisError, OSError):
                pass  # the queue says so in ``away``
            await asyncio.sleep(LOOK_INTERVAL_S)

    def ready(self) -> tuple[bool, str]:
        """Whether requests are welcome, and if not, why."""
        if self.draining:
            return False, "shutting down"
        if self._queue.away is not None:
            return False, self._queue.away
        if not self.head_control.workers:
            return False, self.head_control.problem
        return (True, "ready") if self._queue.workers else (False, "no worker takes jobs from the queue")

    def info(self) -> dict[str, Any]:
        """What ``GET /info`` answers.

        Raises:
            EngineDead: no worker is known, so neither is the model.
        """
        worker_info, bounds = self.head_control.worker_info, self.services.limits
        bounds = replace(bounds, tokens=self._prompts.max_tokens)
        heads = [row["name"] for row in worker_info.heads]
        concurrency = sum(worker.backbone.concurrency for worker in self.head_control.workers.values())
        return about(
            replace(worker_info.backbone, concurrency=concurrency),
            worker_info.policy_version,
            worker_info.template,
            heads,
            bounds,
            self.settings.queue_tokens,
        )

    async def close(self, timeout: float) -> bool:
        """Leaves Redis; whoever still waits has been answered by the server's own draining. True if nothing was
        left.
        """
        self.draining = True
        self._looking.cancel()
        self._bulk.cancel()
        await asyncio.gather(self._looking, self._bulk, return_exceptions=True)
        left = self._queue.open_jobs
        await self._queue.leave()
        await self._connection.close()
        logs.event(LOG, "stopped", clean=not left)
        return not left
