"""What an API replica is without: a backbone, and what is installed for one."""

import subprocess
import sys
from pathlib import Path

import pytest

from inward.processes.wiring import find_model, open_prompts
from inward.settings import Settings
from support import bare_inward

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
