"""``inward serve``: API and worker in one process, with a queue in memory."""

from __future__ import annotations

import asyncio
from typing import Any

from inward import __version__, logs, metrics
from inward.api.app import create_app
from inward.api.services import Services
from inward.control.heads import LocalHeadControl
from inward.engine import Engine
from inward.intake import Intake
from inward.processes.supervisor import Supervisor
from inward.processes.wiring import Loaded, about, drain, find_model, let_go, load, rules
from inward.queues.memory import MemoryQueue
from inward.queues.single_flight import SingleFlight
from inward.settings import Settings
from inward.stores.idempotency import MemoryIdempotencyStore
from inward.types import Scored
from inward.worker import Worker

LOG = logs.logger("processes")


class Standalone:
    """Everything one process of ``inward serve`` holds, opened in order and closed in reverse."""

    def __init__(self, settings: Settings, loaded: Loaded) -> None:
        backbone, prompts, registry = loaded.backbone, loaded.prompts, loaded.registry
        self.settings, self.backbone, self.prompts, self.registry = settings, backbone, prompts, registry
        self.draining = False
        self.queue = MemoryQueue(max_tokens=settings.queue_tokens)
        self.worker = Worker(self.queue, Engine(backbone, registry), shared=False)
        self.services = Services(
            prompts=prompts,
            intake=Intake(SingleFlight(self.queue, window=settings.sharing_window, current=self.current)),
            heads=LocalHeadControl(registry, backbone, prompts),
            policies=loaded.policies,
            sleeper=backbone,
            model=backbone.info.name,
            info=self.info,
            ready=self.ready,
            alive=self.alive,
            idempotency=MemoryIdempotencyStore(keep=settings.idempotency_window, running=settings.timeout + 30),
            **rules(settings),
        )
        self.app = create_app(self.services)
        metrics.BUILD_INFO.labels(version=__version__, role="serve").set(1)
        self._tasks = Supervisor()
        self._working = self._tasks.watch("jobs", self.worker.run)
        self.ending = self._tasks.watch("watchdog", self._until_stuck)
        self.stuck = False

    @classmethod
    async def open(cls, settings: Settings) -> Standalone:
        """Loads the model and its heads.

        Raises:
            SetupError: something does not fit; nothing is left open.
        """
        return cls(settings, await load(settings, find_model(settings)))

    async def _until_stuck(self) -> None:
        """Ends where the device does not let go of what it has: only the end of the process frees it then."""
        await asyncio.wait({self._working})
        self.stuck = self.worker.dead is not None and not await let_go(self.backbone)
        if not self.stuck:
            await asyncio.Event().wait()

    def alive(self) -> bool:
        """Whether the backbone can compute."""
        return self.worker.dead is None and self.backbone.healthy() and not self._working.done()

    def ready(self) -> tuple[bool, str]:
        """Whether requests are welcome, and if not, why."""
        if not self.alive():
            return False, f"the engine is dead: {self.worker.dead or 'the backbone stopped'}"
        if self.draining:
            return False, "shutting down"
        if self.backbone.asleep:
            return False, "the backbone sleeps: POST /wake"
        return self._tasks.problem is None, self._tasks.problem or "ready"

    def current(self, scored: Scored) -> bool:
        """Whether no head or policy was switched since."""
        heads = self.registry.snapshot().heads
        return scored.policy_version == self.backbone.policy_version and all(
            ref.name in heads and heads[ref.name].ref == ref for ref in scored.heads
        )

    def info(self) -> dict[str, Any]:
        """What ``GET /info`` answers."""
        backbone = self.backbone
        return about(backbone.info, backbone.policy_version, self.prompts, self.registry.names(), self.settings)

    def ready_fields(self) -> dict[str, Any]:
        """See ``server.Served``."""
        return {"model": self.backbone.info.name, "heads": self.registry.names()}

    async def close(self, timeout: float) -> bool:
        """Answers what was accepted, for at most ``timeout`` seconds, then gives the device back. True if nothing
        was left.
        """
        self.draining = True
        await self.queue.close()
        clean = await drain(self._working, timeout) and self.worker.dead is None
        await self._tasks.stop()
        self.stuck = self.stuck or not await let_go(self.backbone)
        logs.event(LOG, "stopped", clean=clean)
        return clean
