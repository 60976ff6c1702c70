"""What an API replica is without: a backbone, and what is installed for one."""

import subprocess
import sys
from pathlib import Path

import pytest

from inward.processes.wiring import find_model, open_prompts
from inward.settings import Settings
from support import bare_inward
from support.fleet import Fleet
from support.gguf_files import write
from support.waiting import wait_until

SERVICE = Path(__file__).parents[2] / "service"
TRAINERS = {"trl", "peft", "datasets", "pandas"}
OPTIONAL = {"rich"}
"""httpx takes it where it is there, and does without."""


def test_it_imports_nothing_that_its_own_distribution_does_not_bring():
    code = "import sys, inward.processes.api; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=SERVICE, capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "fastapi" in loaded
    assert not loaded & ((bare_inward.standard() | TRAINERS) - OPTIONAL)


@pytest.mark.parametrize("words", [["--help"], ["api", "--help"], ["worker", "--help"]], ids=" ".join)
def test_the_bare_command_line_helps(words):
    done = subprocess.run([sys.executable, bare_inward.__file__, *words], capture_output=True, text=True, cwd=SERVICE)
    assert done.returncode == 0, done.stderr


def test_the_default_model_can_be_tokenised_for_without_its_weights():
    model = find_model(Settings(), weights=False)
    prompts = open_prompts(Settings(), model, 8192)
    assert model.name == "smollm2"
    assert prompts.render("Hi.").endswith("<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n")
    assert not list(model.folder.glob("*.safetensors"))


def test_what_needs_a_model_says_what_to_install(tmp_path):
    command = [sys.executable, bare_inward.__file__, "serve", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=SERVICE)
    assert done.returncode == 2
    assert "inward[standard]" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_replica_of_a_gguf_file_has_its_tokenizer_from_a_worker(tmp_path, redis_server):
    write(tmp_path / "tiny.gguf")
    (tmp_path / "heads").mkdir()
    with Fleet(tmp_path, redis_server.url, queue="gguf") as fleet:
        fleet._settings |= {"XDG_CACHE_HOME": str(tmp_path / "api")}
        api = fleet.api("--model", "some-one/elsewhere:tiny.gguf")  # nobody could fetch it
        wait_until(lambda: api.events("waiting_for_tokenizer"))
        fleet._settings |= {"XDG_CACHE_HOME": str(tmp_path / "worker")}
        worker = fleet.worker("--model", str(tmp_path / "tiny.gguf"))
        fleet.wait_until_ready(api, worker)  # so tokenizer and template are the worker's
        assert not [file for file in (tmp_path / "api").rglob("*") if file.suffix in (".safetensors", ".gguf")]
        assert list((tmp_path / "api").rglob("tokenizer.json"))
