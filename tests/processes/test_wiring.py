"""What is refused while a process comes up."""

import pytest

from inward.backbones.fake import FakeBackbone
from inward.errors import HeadError, InvalidField
from inward.processes import wiring
from inward.processes.wiring import heads_folder, read_once
from inward.settings import Settings
from support.corridor import FakeHead


class Heads:
    def __init__(self, *heads):
        self.heads = {head.ref.name: head for head in heads}

    def snapshot(self):
        return self


async def test_a_head_that_the_backbone_cannot_be_read_for_is_refused_by_name(monkeypatch):
    backbone = FakeBackbone()
    await read_once(backbone, Heads(FakeHead("fits")))
    assert backbone.calls == 1

    async def read(groups, readouts, *, tokens=False):
        raise InvalidField("it has no end-of-sequence token")

    monkeypatch.setattr(backbone, "read", read)
    with pytest.raises(HeadError, match="head 'ends' can't be read on fake: it has no end-of-sequence token"):
        await read_once(backbone, Heads(FakeHead("ends")))


def test_other_heads_that_come_with_a_release_are_served_and_updates_of_the_former_ones_stay(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(wiring, "MODELS", tmp_path)
    bundled = tmp_path / "toy/heads/hybrid"
    bundled.mkdir(parents=True)
    (bundled / "head.json").write_text("first")
    first = heads_folder(Settings(model="toy"))
    (first / "hybrid/updated").write_text("online")
    assert heads_folder(Settings(model="toy")) == first
    (bundled / "head.json").write_text("second")
    second = heads_folder(Settings(model="toy"))
    assert (second / "hybrid/head.json").read_text() == "second" and not (second / "hybrid/updated").exists()
    assert (first / "hybrid/updated").read_text() == "online"
