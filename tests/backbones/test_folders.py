"""What is known of a model folder before any model is loaded: where it is, its fingerprint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from inward.backbones.fingerprint import fingerprint
from inward.backbones.loading import resolve
from inward.errors import SetupError
from support.tiny_models import save


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def edit(file: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content, indent=7))


def test_a_copy_has_the_same_fingerprint_whatever_serves_it(saved: Path, folder: Path) -> None:
    edit(
        folder / "config.json",
        lambda c: c.update(transformers_version="9", dtype="bfloat16", use_cache=False, _name_or_path="elsewhere"),
    )
    edit(folder / "tokenizer.json", lambda t: t.update(truncation={"max_length": 5}, padding=None))
    assert fingerprint(folder) == fingerprint(saved)
    assert fingerprint(saved).startswith("sha256:")
    assert len(fingerprint(saved)) == len("sha256:") + 32


def change_weights(folder: Path, at: float) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[int(at * (len(data) - 1))] ^= 1
    (folder / "model.safetensors").write_bytes(data)


@pytest.mark.parametrize("at", [0.2, 0.5, 1.0])
def test_one_changed_bit_of_small_weights_changes_the_fingerprint(at: float, saved: Path, folder: Path) -> None:
    change_weights(folder, at)
    assert fingerprint(folder) != fingerprint(saved)


def test_another_configuration_or_vocabulary_changes_the_fingerprint(saved: Path, folder: Path) -> None:
    prints = {fingerprint(saved)}
    edit(folder / "config.json", lambda c: c.update(rms_norm_eps=1e-3))
    prints.add(fingerprint(folder))
    edit(folder / "tokenizer.json", lambda t: t["model"]["vocab"].update(new=64))
    prints.add(fingerprint(folder))
    assert len(prints) == 3


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 64, (10).to_bytes(8, "little") + b"not json!!"])
def test_a_damaged_weights_file_is_named(content: bytes, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(SetupError, match=r"model\.safetensors"):
        fingerprint(folder)


def test_a_folder_without_safetensors_has_no_fingerprint(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(SetupError, match=r"no \*\.safetensors"):
        fingerprint(folder)


def test_a_folder_resolves_to_itself_and_anything_else_says_what_to_do(saved: Path, tmp_path: Path) -> None:
    assert resolve(str(saved)) == saved.resolve()
    with pytest.raises(SetupError, match=r"config\.json"):
        resolve(str(tmp_path))
    with pytest.raises(SetupError, match="no folder"):
        resolve(str(tmp_path / "missing"))


def test_a_model_that_the_hub_cannot_give_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SetupError, match="some-one/some-model"):
        resolve("some-one/some-model")
    with pytest.raises(SetupError, match="neither a folder here nor a model"):
        resolve("not a/valid/name")
