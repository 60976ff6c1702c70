"""The bundled recipes as they are, with a small model in the place of theirs and a stand-in for the service."""

import json

import pytest

from inward_trainer import cdpo, rm
from inward_trainer.__main__ import parser
from inward_trainer.logs import read_log
from inward_trainer.options import CdpoOptions, RewardOptions, read_options, read_recipe, recipes
from support.fake_inward import FakeInward, served
from support.small_policy import rows, write_policy, write_rows

COMMANDS = {"cdpo": (cdpo.run, CdpoOptions), "rm": (rm.run, RewardOptions)}


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_takes_an_optimiser_step(name, tmp_path):
    recipe = read_recipe(name)
    pairs = recipe["batch_size"] * recipe["accumulate"]
    command = name.partition("-")[0]
    fake = FakeInward(adapters=tmp_path / "adapters")
    with served(fake) as url:
        given = [
            "--recipe",
            name,
            "--model",
            str(write_policy(tmp_path / "model")),
            "--url",
            url,
            "--out",
            str(tmp_path / "run"),
            "--steps",
            "1",
        ]
        if command == "cdpo":
            prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in rows(pairs)])
            given += ["--prompts", str(prompts), "--adapters", str(fake.adapters)]
        else:
            given += ["--pairs", str(write_rows(tmp_path / "pairs.jsonl", rows(pairs)))]
        run, options = COMMANDS[command]
        assert run(read_options(options, parser().parse_args([command, *given]), {})) == 0
    if command == "cdpo":
        (step,) = [line for line in read_log(tmp_path / "run/log.jsonl") if "loss" in line]
        assert len(step["pairs"]) == pairs
        assert step["loss"] == pytest.approx(0.6931, abs=1e-3), "policy and reference are the same"
    else:
        assert json.loads((tmp_path / "run/report.json").read_text())["pairs"] == pairs
