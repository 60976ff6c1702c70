"""What a process that only tokenises fetches and reads: no file with weights, whatever the model is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from inward.backbones.loading import NoTokenizerHere, resolve
from support.gguf_files import write
from support.hub import hub
from support.tiny_models import save

BARE = Path(__file__).parents[1] / "support/bare_inward.py"
OPENED = """
import json, runpy, sys
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
sys.argv = ["bare"]
sys.modules.update(dict.fromkeys(runpy.run_path({bare!r})["standard"]()))
from inward.processes.wiring import find_model, open_prompts
from inward.settings import Settings
settings = Settings(model={model!r})
model = find_model(settings, weights=False)
prompts = open_prompts(settings, model, 1000)
print(json.dumps([path for path in opened if path.endswith((".safetensors", ".gguf", ".bin", ".pt", ".npz"))]))
"""
"""As an API replica begins, without what reads weights: prints which files with weights it opened."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("llama"))


def opened(model: str, **env: str) -> list[str]:
    """Files with weights that a replica of ``model`` opens."""
    source = OPENED.format(bare=str(BARE), model=model)
    environment = {"PYTHONPATH": ":".join(sys.path), "PATH": "", **env}
    done = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("model", ["smollm2", "toy"])
def test_of_a_bundled_model_the_tokenizer_is_read(model: str, tmp_path: Path) -> None:
    assert opened(model, HOME=str(tmp_path)) == []


def test_of_a_folder_the_tokenizer_and_the_settings_are_read(saved: Path, tmp_path: Path) -> None:
    assert (saved / "model.safetensors").exists()
    assert opened(str(saved), HOME=str(tmp_path)) == []


def test_of_a_hub_the_tokenizer_and_the_settings_are_fetched(saved: Path, tmp_path: Path) -> None:
    with hub() as server:
        server.repositories["org/model"] = {file.name: file.read_bytes() for file in saved.iterdir()}
        assert opened("org/model", HF_ENDPOINT=server.url, HF_HOME=str(tmp_path), HOME=str(tmp_path)) == []
        fetched = {line.rpartition("/")[2] for line in server.asked if "/resolve/" in line}
    assert {"tokenizer.json", "config.json"} <= fetched
    assert not [name for name in fetched if name.endswith((".safetensors", ".bin", ".gguf"))]


def test_of_a_gguf_file_what_it_was_converted_to_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write(tmp_path / "tiny.gguf")
    with pytest.raises(NoTokenizerHere, match="has not been converted here"):
        resolve(str(tmp_path / "tiny.gguf"), weights=False)
    folder = resolve(str(tmp_path / "tiny.gguf"), dtype="float32")
    for model in (tmp_path / "tiny.gguf", tmp_path):
        assert resolve(str(model), weights=False) == folder
        assert opened(str(model), XDG_CACHE_HOME=str(tmp_path / "cache"), HOME=str(tmp_path)) == []


def test_a_gguf_file_of_the_hub_is_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub() as server:
        server.repositories["org/model"] = {"tiny.gguf": b"GGUF"}
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(NoTokenizerHere):
            resolve("org/model:tiny.gguf", weights=False)
        assert server.asked == []
