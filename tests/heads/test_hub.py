"""Heads from and to a hub, with the hub's own client against a hub of our own."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_api

from inward.errors import SetupError
from inward.heads import store
from inward.heads.hub import HubHeads, fetch, push
from inward.processes.wiring import TOY, heads_folder
from inward.settings import Settings
from support.hub import hub

HYBRID = TOY / "heads/hybrid"


@pytest.fixture
def a_hub(monkeypatch, tmp_path):
    """What the hub's package reads of the environment it reads when it is imported."""
    with hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(hf_api.api, "endpoint", running.url)
        monkeypatch.setenv("HF_TOKEN", "hf_a_token_of_the_tests")
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
        yield running


@pytest.mark.parametrize(
    ("address", "meant"),
    [
        ("hf://org/heads", HubHeads("org/heads")),
        ("hf://org/he-ads_1.0@v1.2", HubHeads("org/he-ads_1.0", "v1.2")),
        (Path("hf://org/heads@refs/pr/1"), HubHeads("org/heads", "refs/pr/1")),
        ("heads", None),
        (Path("/somewhere/hf"), None),
    ],
)
def test_an_address_is_told_from_a_folder(address, meant):
    assert HubHeads.parse(address) == meant


@pytest.mark.parametrize("address", ["hf://heads", "hf://a/b/c", "hf://org/heads@", "hf:///etc/../x", "hf://"])
def test_what_looks_like_an_address_and_is_none_is_refused(address):
    with pytest.raises(SetupError, match="hf://ORG/REPO@REVISION"):
        HubHeads.parse(address)


def test_a_head_that_was_pushed_is_fetched_as_it_was_and_the_card_tells_of_it(a_hub, tmp_path):
    address = push(HYBRID, HubHeads("org/heads"), private=True)
    files = a_hub.repositories["org/heads"]
    assert set(files) == {"README.md", "hybrid/README.md", "hybrid/head.json", "hybrid/head.safetensors"}
    assert address == f"hf://org/heads@{a_hub.commit('org/heads')}"
    card = files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: inward\n") and "--heads hf://org/heads" in card
    fetched = heads_folder(Settings(heads=Path(address), model="toy"))
    for name in (store.MANIFEST, store.TENSORS):
        assert (fetched / "hybrid" / name).read_bytes() == (HYBRID / name).read_bytes()


def test_several_heads_share_a_repository_whose_own_card_is_left_alone(a_hub, tmp_path):
    for name in ("legend", "srr"):
        push(TOY / "heads" / name, HubHeads("org/heads"))
    assert "# legend" in a_hub.repositories["org/heads"]["README.md"].decode()
    folder = fetch(HubHeads("org/heads"), tmp_path / "state")
    assert {found.name for found in store.find(folder)} == {"legend", "srr"}


def test_nothing_but_manifests_and_tensors_is_fetched(a_hub, tmp_path):
    push(HYBRID, HubHeads("org/heads"))
    a_hub.repositories["org/heads"]["hybrid/evil.pkl"] = b"\x80\x04"
    folder = fetch(HubHeads("org/heads"), tmp_path / "state")
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == ["head.json", "head.safetensors"]
    assert not any("evil" in asked for asked in a_hub.asked)


def test_a_head_of_another_model_is_refused_as_ever(a_hub, tmp_path):
    push(HYBRID, HubHeads("org/heads"))
    folder = fetch(HubHeads("org/heads"), tmp_path / "state")
    with pytest.raises(SetupError, match="was fitted on toy"):
        store.load(folder / "hybrid", fingerprint="sha256:another", template=None)


def test_what_is_not_there_is_said(a_hub, tmp_path):
    a_hub.repositories["org/empty"] = {"README.md": b"nothing"}
    for address, said in (
        (HubHeads("org/none"), "no repository"),
        (HubHeads("org/empty", "v9"), "no revision 'v9'"),
        (HubHeads("org/empty"), "has no heads"),
    ):
        with pytest.raises(SetupError, match=said):
            fetch(address, tmp_path / "state")


def test_updates_stay_beside_what_was_fetched_and_another_commit_is_another_folder(a_hub, tmp_path):
    push(HYBRID, HubHeads("org/heads"))
    first = fetch(HubHeads("org/heads"), tmp_path / "state")
    shutil.copytree(first / "hybrid", first / "own")
    assert fetch(HubHeads("org/heads"), tmp_path / "state") == first and (first / "own").is_dir()
    push(TOY / "heads/legend", HubHeads("org/heads"))
    assert fetch(HubHeads("org/heads"), tmp_path / "state") != first


def test_what_a_killed_process_of_the_same_number_left_is_in_nobodys_way(a_hub, tmp_path):
    push(HYBRID, HubHeads("org/heads"))
    folder = fetch(HubHeads("org/heads"), tmp_path / "state")
    folder.rename(folder.with_name(f".{folder.name}.{os.getpid()}"))
    assert fetch(HubHeads("org/heads"), tmp_path / "state") == folder
    assert store.load(folder / "hybrid").ref.name == "hybrid"
