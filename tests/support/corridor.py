"""A corridor without a model and without a registry on disk: for tests of what lies between."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from types import SimpleNamespace

import numpy as np

from inward.backbones.fake import FakeBackbone
from inward.engine import Engine
from inward.errors import InvalidField, NotFound
from inward.heads.calibration import PairCalibration
from inward.intake import Intake
from inward.queues.memory import MemoryQueue
from inward.types import Group, HeadRef, Readout, Scores, Tap
from inward.worker import Worker
from support.waiting import PATIENCE, until


class FakeHead:
    """One tap at the last layer; the score is its number. ``bad`` ids at the end of a response make it not finite."""

    def __init__(self, name="plain", version=1, seed=0, layer=4, width=16, gamma=None):
        weight = np.random.default_rng(seed).normal(size=(width, 1)).astype(np.float32)
        self.readout = Readout((Tap(layer, "last", weight),))
        self.ref = HeadRef(name, "legend", version)
        self.manifest = SimpleNamespace(kind="legend", calibration={}, options={}, pool=None)
        self.pools = False
        self.gamma = gamma

    def tensors(self):
        return {"weight": self.readout.taps[0].weight_DK}

    def score(self, reading, *, details=frozenset(), pair=False):
        if "layers" in details:
            raise InvalidField("this head has no layers", param="detail")
        values = reading.values_NK[:, 0]
        scores = tuple(float(v) if np.isfinite(v) else None for v in values)
        return Scores(
            scores,
            tokens_N=tuple(tuple(map(float, values[:, 0])) for values in reading.tokens_TK or ()) or None,
            pair=PairCalibration(None, None).compare(scores) if pair else None,
            gamma=self.gamma,
        )


class FakeRegistry:
    """Snapshots of heads that tests exchange by assigning ``heads``."""

    def __init__(self, *heads):
        self.heads = {head.ref.name: head for head in heads}

    def snapshot(self):
        return FakeSnapshot(dict(self.heads))


class FakeSnapshot:
    def __init__(self, heads):
        self._heads = heads

    def resolve(self, name, kinds=()):
        if name not in self._heads:
            raise NotFound(f"no head {name!r}")
        return self._heads[name]

    def value_of(self, name):
        return next((head for head in self._heads.values() if head.manifest.options.get("of") == name), None)


class Corridor:
    def __init__(self, *, max_tokens=100_000, max_length=32768, **backbone):
        self.backbone = FakeBackbone(**backbone, max_tokens=max_length)
        self.registry = FakeRegistry(FakeHead())
        self.queue = MemoryQueue(max_tokens=max_tokens)
        self.engine = Engine(self.backbone, self.registry)
        self.worker = Worker(self.queue, self.engine)
        self.intake = Intake(self.queue)

    async def score(self, groups, **options):
        return await self.intake.score(groups, **{"heads": ("plain",), "timeout": PATIENCE, **options})

    @asynccontextmanager
    async def busy(self, groups):
        """The device has a batch with ``groups`` in it, and nothing is computed in here; gives the task of who waits
        for them."""
        async with self.backbone._device:
            waiting = asyncio.create_task(self.score(groups))
            await until(lambda: self.worker._running)
            yield waiting


@asynccontextmanager
async def corridor(**options):
    """A corridor whose worker runs."""
    opened = Corridor(**options)
    running = asyncio.create_task(opened.worker.run())
    try:
        yield opened
    finally:
        await opened.queue.close()
        await asyncio.wait_for(running, PATIENCE)


def groups(n, *, seed=0, responses=1, longest=30):
    rng = np.random.default_rng(seed)

    def ids():
        return tuple(int(i) for i in rng.integers(1, 200, size=rng.integers(1, longest)))

    return [Group(ids(), tuple(ids() for _ in range(responses))) for _ in range(n)]
