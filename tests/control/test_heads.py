"""Head control of a process that owns a backbone."""

import numpy as np

from inward import metrics
from inward.backbones.fake import FakeBackbone
from inward.control.heads import LocalHeadControl
from inward.heads import store
from inward.heads.base import BackboneRef, Manifest
from inward.heads.hybrid import HybridHead
from inward.heads.recent import LEAST_PAIRS
from inward.heads.registry import Registry
from inward.prompts import Prompts, Texts
from support.tiny_tokenizer import tokenizer

PROMPTS = Prompts(tokenizer(), max_tokens=512)


async def test_updates_tell_how_well_the_head_still_fits(tmp_path):
    backbone = FakeBackbone(2, 8)
    manifest = Manifest(
        name="followed", kind="hybrid", version=1, created="2025-01-01T00:00:00Z",
        template=PROMPTS.template, layers=(2,),
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
    store.save(head, tmp_path / "followed")
    control = LocalHeadControl(
        Registry.open(tmp_path, info=backbone.info, template=PROMPTS.template), backbone, PROMPTS
    )
    pairs = [Texts(f"question {i}", (f"good answer {i}", f"bad one {i}")) for i in range(LEAST_PAIRS)]
    few, rest = pairs[:-1], pairs[-1:]
    await control.update("followed", 1, few, lr=1e-3)
    assert metrics.REGISTRY.get_sample_value("inward_head_fit_cosine", {"head": "followed"}) is None
    await control.update("followed", 2, rest, lr=1e-3)
    assert -1 <= metrics.REGISTRY.get_sample_value("inward_head_fit_cosine", {"head": "followed"}) <= 1
