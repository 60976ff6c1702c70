"""KServe's and SkyPilot's files, against Inward's own options, settings and routes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import yaml

from inward import __version__
from inward.api.app import PATHS
from inward.commands.parser import command_line
from inward.settings import Settings

DEPLOY = Path(__file__).parents[2] / "deploy"
RUNTIME, SERVICE = yaml.safe_load_all((DEPLOY / "kserve.yaml").read_text())
SKY = yaml.safe_load((DEPLOY / "skypilot.yaml").read_text())


def are_settings(names):
    return {name.removeprefix("INWARD_").lower() for name in names} <= Settings.model_fields.keys()


def test_kserve_starts_inward_on_what_it_mounts():
    (container,) = RUNTIME["spec"]["containers"]
    assert container["name"] == "kserve-container" and container["image"] == f"inward:{__version__}-gpu"
    args = command_line().parse_args(container["args"])
    assert (args.command, args.model) == ("serve", "/mnt/models")
    assert are_settings(variable["name"] for variable in container["env"])
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["path"] in PATHS and container[probe]["httpGet"]["port"] == 8080
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in RUNTIME["spec"]["volumes"]}


def test_the_model_of_kserve_names_the_runtime_and_its_format():
    model = SERVICE["spec"]["predictor"]["model"]
    assert model["runtime"] == RUNTIME["metadata"]["name"]
    assert model["modelFormat"]["name"] in {one["name"] for one in RUNTIME["spec"]["supportedModelFormats"]}
    assert are_settings(variable["name"] for variable in model["env"])


def test_skypilot_starts_inward_where_it_is_probed():
    serve = next(line for line in SKY["run"].splitlines() if line.startswith("inward "))
    args = command_line().parse_args(shlex.split(serve)[1:])
    assert (args.command, int(args.port)) == ("serve", SKY["resources"]["ports"])
    assert SKY["service"]["readiness_probe"]["path"] in PATHS
    used = set(re.findall(r"INWARD_\w+", SKY["run"])) | {name for name in SKY["secrets"] if name.startswith("INWARD_")}
    assert used and are_settings(used)
    assert set(re.findall(r"\$(\w+)", SKY["run"])) <= {*SKY["envs"], "SKYPILOT_NUM_GPUS_PER_NODE"}
