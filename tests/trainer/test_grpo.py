"""The recipe for GRPO as it stands in ``examples``: real steps of TRL's trainer, with rewards from a live server."""

import json
import math
import runpy
from pathlib import Path

import pytest

from support.small_policy import DEMO, write_rows

main = runpy.run_path(str(Path(__file__).parents[2] / "examples/grpo.py"))["main"]


def test_the_recipe_takes_steps_on_our_rewards_and_logs_the_monitor(demo_server, tmp_path):
    asked = [{"prompt": f"How do I open a {what}?"} for what in ("lock", "jar")]
    given = {
        "url": demo_server.url, "model": DEMO / "backbone", "prompts": write_rows(tmp_path / "prompts.jsonl", asked),
        "out": tmp_path, "monitor": "legend", "steps": 4, "prompts-per-step": 2, "samples": 4, "max-tokens": 8,
        "learning-rate": 1e-4,
    }  # fmt: skip
    told = main([word for name, value in given.items() for word in (f"--{name}", str(value))] + ["--lora"])
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    assert all(line["reward"] == pytest.approx(line["rewards/reward/mean"]) for line in lines), (
        "the monitor weighs nothing"
    )
    assert all(math.isfinite(line["rewards/monitor/mean"]) and line["reward/unscored"] == 0 for line in lines)
    assert any(line["grad_norm"] > 0 for line in lines)
    assert told.keys() == {"reward", "monitor"}
    assert told["reward"]["low"] < told["reward"]["rise"] < told["reward"]["high"]
    assert (tmp_path / "final/adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 3}, "--steps 3: at least 4"),
        ({"prompts": "nowhere.jsonl"}, "nowhere.jsonl does not exist"),
        ({"head": "nobody"}, "the service has no head 'nobody': it has "),
        ({"monitor": "nobody"}, "'nobody'"),
    ],
)
def test_what_can_not_be_trained_with_is_told_before_the_policy_is_loaded(
    changes, said, demo_server, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(main.__globals__, "GRPOTrainer", None)  # would raise
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "How do I open a jar?"}])
    given = {"url": demo_server.url, "model": "none", "prompts": prompts, "out": tmp_path} | changes
    with pytest.raises(SystemExit) as stopped:
        main([word for name, value in given.items() for word in (f"--{name}", str(value))])
    assert said in f"{stopped.value} {capsys.readouterr().err}"
