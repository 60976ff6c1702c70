"""Dockerfile, compose file and chart, against the repository and the settings that there are; against linters where
they are installed."""

from __future__ import annotations

import fnmatch
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from deploy.replay_image import stages, variables

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker-compose.yml"


def tool(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(name) is None, reason=f"no {name}: make test-deploy installs it")


def copied() -> list[str]:
    lines = [
        rest for instructions in stages(ROOT / "Dockerfile").values() for kind, rest in instructions if kind == "COPY"
    ]
    return [source for rest in lines if not rest.startswith("--from=") for source in rest.split()[:-1]]


def services() -> dict[str, dict]:
    return yaml.safe_load(COMPOSE.read_text())["services"]


@pytest.mark.parametrize("source", copied())
def test_what_the_image_copies_is_there_and_not_ignored(source):
    assert (ROOT / source).exists()
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert any(fnmatch.fnmatch(source, pattern) for pattern in allowed)


def test_the_image_is_nobodys_root_and_says_how_it_is():
    service = [*stages(ROOT / "Dockerfile")["base"], *stages(ROOT / "Dockerfile")["service"]]
    kinds = [kind for kind, _ in service]
    assert dict(service)["USER"] == "10001"
    assert {"HEALTHCHECK", "ENTRYPOINT", "VOLUME"} <= set(kinds)
    assert variables(service)["INWARD_HOST"] == "0.0.0.0"


@pytest.mark.parametrize("path", ["Dockerfile", "docker-compose.yml", "deploy/k8s/templates", "deploy/k8s/values.yaml"])
def test_every_variable_that_is_set_is_a_setting(path):
    from inward.settings import Settings

    files = [ROOT / path] if (ROOT / path).is_file() else sorted((ROOT / path).glob("*"))
    used = {
        name.lower() for file in files for name in re.findall(r"\bINWARD_(?!TRAIN_)([A-Z_]+[A-Z])\b", file.read_text())
    }
    assert used <= set(Settings.model_fields)


def test_every_variable_of_the_trainer_is_an_option_of_it():
    from inward_trainer.options import CdpoOptions

    used = set(re.findall(r"\bINWARD_TRAIN_([A-Z_]+[A-Z])\b", COMPOSE.read_text()))
    assert {name.lower() for name in used} <= CdpoOptions.model_fields.keys()


def test_images_have_their_version_in_their_tag():
    from inward import __version__

    tags = {name: service["image"] for name, service in services().items() if "build" in service}
    assert tags == {
        "api": f"inward:${{VERSION:-{__version__}}}-api",
        "worker-cpu": f"inward:${{VERSION:-{__version__}}}-cpu",
        "worker-gpu": f"inward:${{VERSION:-{__version__}}}-gpu",
        "trainer": f"inward-trainer:${{VERSION:-{__version__}}}",
    }
    assert f"VERSION={__version__}" in (ROOT / "deploy/env.example").read_text().splitlines()
    chart = yaml.safe_load((ROOT / "deploy/k8s/Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (__version__, __version__)
    assert variables(stages(ROOT / "Dockerfile")["service"])["VERSION"] == __version__


def test_a_gated_model_has_its_token_and_more_variables_reach_api_and_workers():
    for name in ("api", "worker-cpu", "worker-gpu"):
        service = services()[name]
        assert service["environment"]["HF_TOKEN"] == "${HF_TOKEN:-}", name
        assert service["env_file"] == [{"path": "secrets/more.env", "required": False}], name


def test_what_compose_mounts_is_there():
    mounts = [volume for service in services().values() for volume in service.get("volumes", [])]
    for volume in mounts:
        source = volume.partition(":")[0]
        if source.startswith("."):
            assert (ROOT / source).exists(), source
        else:
            assert source in yaml.safe_load(COMPOSE.read_text())["volumes"]


def test_what_compose_runs_is_a_command_of_the_image():
    from inward.commands.parser import command_line

    for name, service in services().items():
        if service["image"].startswith("inward:"):
            command_line().parse_args(service["command"])
            assert service["read_only"] and service["cap_drop"] == ["ALL"], name


def test_variables_that_compose_wants_are_in_the_example():
    wanted = set(re.findall(r"\$\{(\w+):\?", COMPOSE.read_text()))
    given = {
        line.partition("=")[0]
        for line in (ROOT / "deploy/env.example").read_text().splitlines()
        if "=" in line and line[0] != "#"
    }
    assert wanted <= given


@tool("hadolint")
def test_the_linter_of_dockerfiles_is_silent():
    _silent("hadolint", "Dockerfile")


@tool("check-jsonschema")
def test_compose_keeps_to_its_specification():
    _silent("check-jsonschema", "--builtin-schema", "vendor.compose-spec", "docker-compose.yml")


@tool("shellcheck")
def test_the_linter_of_shell_scripts_is_silent():
    _silent("shellcheck", *map(str, sorted((ROOT / "deploy").glob("*.sh"))), ".ci/run")


def _silent(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
