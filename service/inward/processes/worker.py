"""``inward worker``: owns a backbone and works off the queue in a Redis."""

from __future__ import annotations

from functools import partial
from typing import Any

from inward import __version__, logs, metrics
from inward.api.status import create_status_app
from inward.backbones.tokenizer import tokenizer_hash
from inward.control import tokenizer_files
from inward.control.channel import ControlChannel
from inward.control.heads import LocalHeadControl
from inward.control.remote import ControlAgent, WorkerInfo
from inward.engine import Engine
from inward.processes.supervisor import Supervisor
from inward.processes.wiring import (
    Loaded,
    ModelFiles,
    RedisServers,
    about,
    connect,
    drain,
    find_model,
    let_go,
    load,
    served_as,
)
from inward.settings import Settings
from inward.stores.keys import Keys
from inward.worker import Worker

LOG = logs.logger("processes")


class WorkerProcess:
    """Everything one process of ``inward worker`` holds."""

    def __init__(self, settings: Settings, model: ModelFiles, loaded: Loaded, shards: RedisServers) -> None:
        backbone, prompts, registry = loaded.backbone, loaded.prompts, loaded.registry
        self.settings, self.backbone, self.prompts, self.registry = settings, backbone, prompts, registry
        self.draining = self.stuck = False
        self._shards, self._tokenizer = shards, tokenizer_hash(prompts.tokenizer)
        self._queue_name = settings.queue or model.name
        keys = Keys(self._queue_name, served_as(loaded))
        self._queue = shards.consumer(keys, settings, lambda: self.worker_info().encode())
        self.worker = Worker(self._queue, Engine(backbone, registry))
        self._agent = ControlAgent(
            ControlChannel(shards.home, keys),
            self._queue.worker,
            LocalHeadControl(registry, backbone, prompts),
            registry,
            loaded.policies,
            self._queue.publish,
            self._queue.welcome,
            partial(tokenizer_files.pack, model.folder),
        )
        self.app = create_status_app(self.ready, self.alive, self.info)
        metrics.BUILD_INFO.labels(version=__version__, role="worker").set(1)
        self._tasks = Supervisor()
        self._tasks.watch("claims", self._queue.keep)
        self._tasks.watch("control", self._agent.run)
        self.ending = self._tasks.watch("jobs", self._work)

    @classmethod
    async def open(cls, settings: Settings) -> WorkerProcess:
        """Loads the model and its heads.

        Raises:
            SetupError: something does not fit; nothing is left open.
        """
        shards = connect(settings)
        try:
            await shards.check()
            model = find_model(settings)
            return cls(settings, model, await load(settings, model), shards)
        except BaseException:
            await shards.close()
            raise

    async def _work(self) -> None:
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
        return self.worker.dead is None and self.backbone.healthy() and not self.ending.done()

    def ready(self) -> tuple[bool, str]:
        """Whether jobs are taken, and if not, why."""
        if not self.alive():
            return False, f"the engine is dead: {self.worker.dead or 'the backbone stopped'}"
        if self.draining:
            return False, "shutting down"
        problem = self._queue.problem or self._tasks.problem
        if problem is None and not self._agent.in_step.is_set():
            problem = f"this worker {self._agent.behind}"
        lost = self._queue.lost
        return problem is None, problem or (f"ready, but {lost}" if lost else "ready")

    def info(self) -> dict[str, Any]:
        """What ``GET /info`` answers."""
        backbone = self.backbone
        return about(backbone.info, backbone.policy_version, self.prompts, self.registry.names(), self.settings)

    def ready_fields(self) -> dict[str, Any]:
        """See ``server.Served``."""
        return {
            "model": self.backbone.info.name, "heads": self.registry.names(), "worker": self._queue.worker,
            "queue": self._queue_name,
        }  # fmt: skip

    async def close(self, timeout: float) -> bool:
        """Finishes what was taken, for at most ``timeout`` seconds, and gives the rest back. True if nothing was
        left.
        """
        self.draining = True
        await self._tasks.stop("control")
        await self._queue.close()
        self._agent.in_step.set()  # there is nothing left to be in step for
        clean = await drain(self.ending, timeout) and self.worker.dead is None
        await self._tasks.stop()
        await self._queue.leave()
        await self._shards.close()
        self.stuck = not await let_go(self.backbone)
        logs.event(LOG, "stopped", clean=clean)
        return clean
