"""What the plugin for vLLM does before vLLM is there. ``tests/backbones/test_vllm_plugin.py`` has the rest."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from inward.errors import SetupError
from inward.processes import vllm_plugin
from inward.processes.wiring import MODELS, TOY, heads_folder
from support import serving


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("INWARD_HEADS", raising=False)


def test_the_bundled_heads_are_found_by_the_models_fingerprint(tmp_path: Path) -> None:
    elsewhere = tmp_path / "a-name-of-my-own"
    shutil.copytree(TOY / "backbone", elsewhere)
    settings, files = vllm_plugin.chosen(str(elsewhere), None)
    folder = heads_folder(settings)
    assert folder is not None
    assert {head.name for head in folder.iterdir()} == {head.name for head in (TOY / "heads").iterdir()}
    assert (files.folder, files.name) == (elsewhere, "a-name-of-my-own")


@pytest.mark.parametrize(
    ("heads", "reason"),
    [
        (MODELS / "smollm2/heads", "was fitted on smollm2"),
        (Path("/no/such/folder"), "there is no folder of heads at /no/such/folder"),
    ],
)
def test_heads_that_do_not_fit_are_refused(heads: Path, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INWARD_HEADS", str(heads))
    with pytest.raises(SetupError) as refused:
        vllm_plugin.chosen(str(TOY / "backbone"), None)
    assert reason in refused.value.message


def test_a_model_that_no_bundled_head_fits_needs_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = serving.write_model(tmp_path)
    with pytest.raises(SetupError, match="INWARD_HEADS"):
        vllm_plugin.chosen(str(model), None)
    monkeypatch.setenv("INWARD_HEADS", str(tmp_path / "heads"))
    vllm_plugin.chosen(str(model), None)


def test_a_setting_that_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INWARD_MAX_ITEMS", "many")
    with pytest.raises(SetupError, match="INWARD_MAX_ITEMS"):
        vllm_plugin.chosen(str(TOY / "backbone"), None)


def test_a_folder_without_heads_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INWARD_HEADS", str(tmp_path))
    with pytest.raises(SetupError, match="there is no head in"):
        vllm_plugin.chosen(str(TOY / "backbone"), None)


def test_weights_that_heads_cannot_know_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    for model in (tmp_path, tmp_path / "model.gguf"):
        with pytest.raises(SetupError, match="safetensors"):
            vllm_plugin.chosen(str(model), None)


@pytest.mark.parametrize(
    ("option", "variable", "keys"),
    [(["one", "two"], "three", {"one", "two"}), (None, "three", {"three"}), (None, "", set()), ("one", "", {"one"})],
)
def test_keys_are_those_that_vllm_lets_in(
    option: list[str] | str | None, variable: str, keys: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", variable)
    assert {key.get_secret_value() for key in vllm_plugin._keys(SimpleNamespace(api_key=option))} == keys


@pytest.mark.parametrize("plugins", [None, "", "other,inwards"])
def test_nothing_is_prepared_unless_asked_by_name(plugins: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm.engine.arg_utils", SimpleNamespace())  # would fail if it were looked at
    if plugins is None:
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    else:
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
    before = "inward.backbones.vllm.hosted" in sys.modules
    vllm_plugin.register()
    assert ("inward.backbones.vllm.hosted" in sys.modules) is before


def test_what_is_registered_imports_next_to_nothing() -> None:
    code = (
        "import sys, json; from inward.processes import vllm_plugin; vllm_plugin.register();"
        "print(json.dumps([name for name in sys.modules if name.split('.')[0] in"
        " ('torch', 'vllm', 'fastapi', 'pydantic', 'numpy', 'transformers')]))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "VLLM_PLUGINS": "inward"}
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert json.loads(said.stdout) == []
