"""Head control of a process that owns a backbone."""

import asyncio

import numpy as np
import pytest

from inward import metrics
from inward.backbones.fake import FakeBackbone
from inward.control.heads import LocalHeadControl
from inward.errors import InvalidField
from inward.heads import store
from inward.heads.base import BackboneRef, Manifest
from inward.heads.hybrid import HybridHead
from inward.heads.pooling import Pool
from inward.heads.recent import LEAST_PAIRS
from inward.heads.registry import Registry
from inward.prompts import Prompts, Texts
from support.tiny_tokenizer import tokenizer

PROMPTS = Prompts(tokenizer(), max_tokens=512)


def followed(folder, backbone, pool=None):
    """Control of one hybrid head of that name."""
    manifest = Manifest(
        name="followed", kind="hybrid", version=1, created="2025-01-01T00:00:00Z",
        template=PROMPTS.template, layers=(2,), pool=pool,
        backbone=BackboneRef(name="fake", fingerprint=backbone.info.fingerprint),
    )  # fmt: skip
    tensors = {
        "probe_weight": np.random.default_rng(0).normal(size=(1, 8)),
        "probe_bias": np.zeros(1),
        "gate_weight": np.zeros((1, 1)),
        "mean": np.zeros((1, 8)),
        "scale": np.ones((1, 8)),
    }
    head = HybridHead.from_tensors(manifest, {name: t.astype(np.float32) for name, t in tensors.items()})
    store.save(head, folder / "followed")
    return LocalHeadControl(Registry.open(folder, info=backbone.info, template=PROMPTS.template), backbone, PROMPTS)


async def test_updates_tell_how_well_the_head_still_fits(tmp_path):
    control = followed(tmp_path, FakeBackbone(2, 8))
    pairs = [Texts(f"question {i}", (f"good answer {i}", f"bad one {i}")) for i in range(LEAST_PAIRS)]
    few, rest = pairs[:-1], pairs[-1:]
    await control.update("followed", 1, few, lr=1e-3)
    assert metrics.REGISTRY.get_sample_value("inward_head_fit_cosine", {"head": "followed"}) is None
    await control.update("followed", 2, rest, lr=1e-3)
    assert -1 <= metrics.REGISTRY.get_sample_value("inward_head_fit_cosine", {"head": "followed"}) <= 1


async def test_a_head_that_pools_is_not_updated_since_its_loss_would_be_another_scores(tmp_path):
    backbone = FakeBackbone(2, 8)
    control = followed(tmp_path, backbone, Pool(name="max_ema"))
    with pytest.raises(InvalidField, match="without --pool") as refused:
        await control.update("followed", 1, [Texts("question", ("good", "bad"))], lr=1e-3)
    assert refused.value.param == "name"
    shown = control.show("followed")
    assert (shown["versions"], shown["sequence"], shown["pool"]["name"]) == ([1], 0, "max_ema")
    assert backbone.calls == 0


async def test_a_version_that_is_activated_during_an_update_stays_active(tmp_path):
    backbone = FakeBackbone(2, 8)
    control = followed(tmp_path, backbone)
    await control.update("followed", 1, [Texts("question", ("good", "bad"))], lr=1e-3)
    reading, go_on, read = asyncio.Event(), asyncio.Event(), backbone.read

    async def slowly(*args, **more):
        reading.set()
        await go_on.wait()
        return await read(*args, **more)

    backbone.read = slowly
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(control.update("followed", 2, [Texts("question", ("good", "bad"))], lr=1e-3))
        await reading.wait()
        tasks.create_task(control.activate("followed", 1))
        await asyncio.sleep(0)
        go_on.set()
    assert control.show("followed")["version"] == 1 and control.show("followed")["versions"] == [1, 2, 3]
