"""``inward worker``: owns a backbone and works off the queue in a Redis."""

from __future__ import annotations

import asyncio
from typing import Any

from inward import __version__, logs, metrics
from inward.api.status import create_status_app
from inward.control.channel import ControlChannel
from inward.control.heads import LocalHeadControl
from inward.control.remote import ControlAgent, WorkerInfo
from inward.engine import Engine
from inward.processes.wiring import (
    Loaded,
    ModelFiles,
    about,
    connect,
    drain,
    find_model,
    limits,
    load,
    tokenizer_hash,
)
from inward.queues.redis.consumer import RedisConsumer
from inward.settings import Settings
from inward.stores.connection import Connection
from inward.stores.keys import Keys
from inward.worker import Worker

LOG = logs.logger("processes")


class WorkerProcess:
    """Everything one process of ``inward worker`` holds."""

    def __init__(self, settings: Settings, model: ModelFiles, loaded: Loaded, connection: Connection) -> None:
        self.settings, self.backbone, self.prompts, self.registry = (
            settings,
            loaded.backbone,
            loaded.prompts,
            loaded.registry,
        )
        self.draining = False
        self._connection, self._tokenizer = connection, tokenizer_hash(model)
        self.queue_name = settings.queue or model.name
        keys = Keys(self.queue_name)
        self._queue = RedisConsumer(
            connection, keys, idle=settings.claim_idle, max_deliveries=settings.max_deliveries, ttl=settings.presence,
            about=lambda: self.worker_info().encode(),
        )  # fmt: skip
        self.name = self._queue.worker
        self.worker = Worker(self._queue, Engine(loaded.backbone, loaded.registry))
        head_control = LocalHeadControl(loaded.registry, loaded.backbone, loaded.prompts)
        self._agent = ControlAgent(
            ControlChannel(connection, keys),
            self._queue.worker,
            head_control,
            loaded.registry,
            loaded.policies,
            self._queue.publish,
        )
        self.app = create_status_app(self.ready, self.alive, self.info)
        metrics.BUILD_INFO.labels(version=__version__, role="worker").set(1)
        self._opening = asyncio.create_task(self._queue.open())  # waits for a Redis that is away
        self.working = asyncio.create_task(self._work())
        self._controlling = asyncio.create_task(self._agent.run())

    @classmethod
    async def open(cls, settings: Settings) -> WorkerProcess:
        """Loads the model and its heads.

        Raises:
            SetupError: something does not fit; nothing is left open.
        """
        connection = connect(settings)
        try:
            await connection.check()
            model = find_model(settings)
            return cls(settings, model, await load(settings, model), connection)
        except BaseException:
            await connection.close()
            raise

    async def _work(self) -> None:
        await self._opening
        await self._agent.in_step.wait()
        await self.worker.run()

    def worker_info(self) -> WorkerInfo:
        """Who we are."""
        backbone, prompts = self.backbone, self.prompts
        return WorkerInfo(
            __version__, backbone.info, backbone.policy_version, prompts.template, self._tokenizer, prompts.max_tokens,
            tuple(self.registry.listing()),
        )  # fmt: skip

    def alive(self) -> bool:
        """Whether the backbone can compute."""
        return self.worker.dead is None and self.backbone.healthy() and not self.working.done()

    def ready(self) -> tuple[bool, str]:
        """Whether jobs are taken, and if not, why."""
        if not self.alive():
            return False, f"the engine is dead: {self.worker.dead or 'the backbone stopped'}"
        if not self._opening.done() or self._queue.away is not None:
            return False, self._queue.away or "waiting for Redis"
        if not self._agent.in_step.is_set():
            return False, f"this worker {self._agent.behind}"
        return (False, "shutting down") if self.draining else (True, "ready")

    def info(self) -> dict[str, Any]:
        """What ``GET /info`` answers."""
        policy, heads, bounds = (
            self.backbone.policy_version,
            self.registry.names(),
            limits(self.settings, self.prompts.max_tokens),
        )
        return about(self.backbone.info, policy, self.prompts.template, heads, bounds, self.settings.queue_tokens)

    async def close(self, timeout: float) -> bool:
        """Finishes what was taken, for at most ``timeout`` seconds, and gives the rest back. True if nothing was
        left.
        """
        self.draining = True
        self._controlling.cancel()
        await self._queue.close()
        self._agent.in_step.set()  # there is nothing left to be in step for
        clean = await drain(self.working, timeout) and self.worker.dead is None
        self._opening.cancel()
        await asyncio.gather(self._controlling, self._opening, return_exceptions=True)
        await self._queue.leave()
        await self._connection.close()
        await self.backbone.close()
        logs.event(LOG, "stopped", clean=clean)
        return clean
