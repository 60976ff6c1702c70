"""What is refused while a process comes up."""

import pytest

from inward.backbones.fake import FakeBackbone
from inward.errors import HeadError, InvalidField
from inward.processes.wiring import read_once
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
