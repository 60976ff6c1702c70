"""``inward api``: talks HTTP, owns no model, and meets its workers in a Redis."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from inward import __version__, logs, metrics
from inward.api.app import create_app
from inward.api.bulk import BulkRunner
from inward.api.services import Services
from inward.backbones.tokenizer import tokenizer_hash
from inward.control.channel import ControlChannel
from inward.control.lora_adapters import RemotePolicyControl
from inward.control.remote import RemoteHeadControl
from inward.errors import Unavailable
from inward.intake import Intake
from inward.processes.supervisor import Supervisor
from inward.processes.wiring import (
    ModelFiles,
    RedisServers,
    about,
    connect,
    find_tokenizer,
    open_prompts,
    rules,
)
from inward.queues.single_flight import SingleFlight
from inward.settings import Settings
from inward.stores.idempotency import RedisIdempotencyStore
from inward.stores.jobs import BulkStore
from inward.stores.keys import Keys
from inward.stores.quota import RedisQuota
from inward.stores.score_streams import ScoreStreams

LOG = logs.logger("processes")
LOOK_INTERVAL_S = 1.0
"""Between two looks of a replica at what its workers say of themselves."""
CHUNKS_AT_ONCE = 2
"""Of bulk jobs in one replica, so that workers find the next one waiting."""
UNKNOWN_TOKENS = 2**31
"""How long a text may be, until a worker has said it."""


class ApiProcess:
    """Everything one process of ``inward api`` holds."""

    def __init__(self, settings: Settings, model: ModelFiles, shards: RedisServers) -> None:
        self.settings = settings
        self.draining = self.stuck = False
        self.ending = None
        self._shards, connection = shards, shards.home
        self._queue_name = settings.queue or model.name
        keys = Keys(self._queue_name)
        beat = min(1.0, settings.presence / 3)
        self._queue = shards.producer(keys, max_tokens=settings.queue_tokens, ttl=settings.presence, beat=beat)
        self._prompts = open_prompts(settings, model, UNKNOWN_TOKENS)
        self.head_control = RemoteHeadControl(
            ControlChannel(connection, keys),
            template=self._prompts.template,
            tokenizer=tokenizer_hash(self._prompts.tokenizer),
        )
        store = BulkStore(connection, keys, keep=settings.bulk_keep, idle=settings.claim_idle)
        self.services = Services(
            prompts=self._prompts,
            jobs=store,
            scores=ScoreStreams(connection, keys, keep=settings.bulk_keep),
            intake=Intake(SingleFlight(self._queue, window=settings.sharing_window, current=self.head_control.current)),
            heads=self.head_control,
            policies=RemotePolicyControl(self.head_control),
            model=model.name,
            info=self.info,
            ready=self.ready,
            alive=lambda: True,
            quota=RedisQuota(connection, keys),
            **rules(settings),
            idempotency=RedisIdempotencyStore(
                connection, keys, keep=settings.idempotency_window, running=settings.timeout + 30
            ),
        )
        self.app = create_app(self.services)
        metrics.BUILD_INFO.labels(version=__version__, role="api").set(1)
        self._tasks = Supervisor()
        self._tasks.watch("signs of life", self._queue.keep_living)
        self._tasks.watch("answers", self._queue.keep_receiving)
        self._tasks.watch("workers", self._look)
        behind = replace(self.services, intake=Intake(self._queue, priority="bulk"), quota=None)
        bulk = BulkRunner(store, behind, idle=settings.claim_idle, max_deliveries=settings.max_deliveries)
        for i in range(CHUNKS_AT_ONCE):
            self._tasks.watch(f"bulk {i}", bulk.run)

    @classmethod
    async def open(cls, settings: Settings) -> ApiProcess:
        """Loads the tokenizer and meets Redis; a Redis or workers that are away are waited for, while ``ready`` says
        so. No file with weights is fetched or read: where the model is one file with them, a worker sends its
        tokenizer, and until there is one we are not open.

        Raises:
            SetupError: something does not fit; nothing is left open.
        """
        shards = connect(settings)
        try:
            await shards.check()
            front = cls(settings, await find_tokenizer(settings, shards.home), shards)
        except BaseException:
            await shards.close()
            raise
        await front._queue.live()
        return front

    async def _look(self) -> None:
        """Keeps an eye on the workers."""
        while True:
            try:
                await self.head_control.refresh()
                if self.head_control.workers:
                    shortest = min(worker_info.max_tokens for worker_info in self.head_control.workers.values())
                    self._prompts.max_tokens = min(shortest, self.settings.max_tokens or shortest)
            except Unavailable:
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
        if not self._queue.workers:
            return False, "no worker takes jobs from the queue"
        lost = self._queue.lost
        return self._tasks.problem is None, self._tasks.problem or (f"ready, but {lost}" if lost else "ready")

    def info(self) -> dict[str, Any]:
        """What ``GET /info`` answers.

        Raises:
            EngineDead: no worker is known, so neither is the model.
        """
        workers = self.head_control.workers.values()
        worker = self.head_control.worker_info
        backbone = replace(worker.backbone, concurrency=sum(one.backbone.concurrency for one in workers))
        heads = [row["name"] for row in worker.heads]
        return about(backbone, worker.policy_version, self._prompts, heads, self.settings, jobs=True)

    def ready_fields(self) -> dict[str, Any]:
        """See ``server.Served``."""
        return {"queue": self._queue_name}

    async def close(self, timeout: float) -> bool:
        """Leaves Redis; whoever still waits has been answered by the server's own draining. True if nothing was
        left.
        """
        self.draining = True
        await self._tasks.stop()
        left = self._queue.open_jobs
        await self._queue.leave()
        await self._shards.close()
        logs.event(LOG, "stopped", clean=not left)
        return not left
