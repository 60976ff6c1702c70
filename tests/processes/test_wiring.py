"""What is refused while a process comes up."""

import os
import shutil

import pytest

from inward import files
from inward.backbones.fake import FakeBackbone
from inward.errors import HeadError, InvalidField, SetupError
from inward.processes import wiring
from inward.processes.wiring import check_heads, heads_folder, read_once
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


@pytest.mark.parametrize(
    ("setting", "name", "said"),
    [
        ("compat_head", "nope", "--compat-head: there is no head 'nope'; loaded: "),
        ("rerank_head", "nope", "--rerank-head: there is no head 'nope'; loaded: "),
        ("guard_head", "srr", "--guard-head: head 'srr' is a srr head, but legend or hybrid or ensemble is needed"),
    ],
)
@pytest.mark.parametrize("heads", [None, wiring.TOY / "heads"])
def test_a_head_that_shall_answer_and_cannot_is_told_before_the_model_is_loaded(
    setting, name, said, heads, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with pytest.raises(SetupError, match=said):
        check_heads(Settings(model="toy", heads=heads, **{setting: name}))
    check_heads(Settings(model="toy", heads=heads, **{setting: "hybrid"}))


def test_what_a_killed_process_of_the_same_number_left_is_in_nobodys_way(tmp_path, monkeypatch):
    """In a container every process has the number 1."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    folder = heads_folder(Settings(model="toy"))
    left = [folder.with_name(f".{folder.name}{ending}") for ending in (f".{os.getpid()}", "-x7")]
    for one in left:
        shutil.copytree(folder, one)
    shutil.rmtree(folder)
    assert heads_folder(Settings(model="toy")) == folder and all(one.is_dir() for one in left)
    shutil.rmtree(folder)
    monkeypatch.setattr(files, "ABANDONED_S", -1.0)
    heads_folder(Settings(model="toy"))
    assert [one.name for one in folder.parent.iterdir()] == [folder.name]


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
