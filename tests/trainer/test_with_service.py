"""The whole loop for real: the demonstration backbone in a served process, its heads, its adapters, and a policy
that gets better."""

import json
import shutil
from itertools import product
from statistics import fmean

import httpx
import pytest

from inward_trainer import cdpo, metrics
from inward_trainer.logs import read_log
from support.serving import started
from support.small_policy import DEMO, options, write_rows

VERBS = ("open", "hide", "break", "steal", "repair", "borrow")
THINGS = ("a car", "a window", "some money", "a lock", "my neighbour's phone", "a bicycle", "a safe", "a letter")
PROMPTS = [f"How do I {verb} {thing}?" for verb, thing in product(VERBS, THINGS)]
STEPS, EVERY, PAIRS = 10, 5, 12
"""Few steps, of as much at once that they go one way, whatever the machine draws."""


def write_heads(folder):
    """The bundled hybrid head, and a copy of it that nobody updates."""
    for name in ("hybrid", "monitor"):
        shutil.copytree(DEMO / "heads/hybrid", folder / name)
        manifest = json.loads((folder / name / "head.json").read_text("utf-8"))
        (folder / name / "head.json").write_text(json.dumps(manifest | {"name": name}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def lived(tmp_path_factory):
    """A service after a run, and the run's log."""
    folder = tmp_path_factory.mktemp("loop")
    (folder / "adapters").mkdir()
    serving = ("--model", "toy", "--heads", str(write_heads(folder / "heads")), "--adapters", str(folder / "adapters"))
    with (
        started(*serving, env={"XDG_STATE_HOME": str(folder / "state")}) as service,
        httpx.Client(base_url=service.url, timeout=300) as ask,
    ):
        before = draw(ask)
        run = options(
            model="service", url=service.url, out=folder / "run", source="samples", steps=STEPS, batch_size=PAIRS,
            samples=6, sampling={"max_tokens": 16, "temperature": 1.0}, learning_rate=5e-4, schedule="constant",
            prompts=write_rows(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS[:12]]),
            warmup=0, lora_rank=16, patience=300, monitor="monitor", update_head=True,
            adapters=folder / "adapters", publish_every=EVERY,
            held_out=write_rows(folder / "held_out.jsonl", [{"prompt": prompt} for prompt in PROMPTS[24:]]),
        )  # fmt: skip
        assert cdpo.run(run) == 0
        yield ask, before, read_log(folder / "run/log.jsonl")


def draw(ask):
    sampling = {"max_tokens": 16, "seed": 1}
    return (
        ask.post("/rerank", json={"prompt": PROMPTS[0], "n": 4, "sampling": sampling, "head": "hybrid"})
        .raise_for_status()
        .json()
    )


def test_the_service_carries_each_version_in_turn_and_answers_with_the_last(lived):
    ask, before, _ = lived
    policy = ask.get("/policy").json()
    names = [one["policy_version"] for one in policy["history"]]
    assert [name.rpartition("-")[2] for name in names] == ["base", "000005", "000010"]
    after = draw(ask)
    assert (before["policy_version"], after["policy_version"]) == ("base", names[-1])
    assert [result["score"] for result in after["results"]] != [result["score"] for result in before["results"]]


def test_the_head_is_updated_by_every_step_and_the_monitor_by_none(lived):
    ask, _, _ = lived
    heads = {name: ask.get(f"/heads/{name}").json() for name in ("hybrid", "monitor")}
    assert {name: (head["sequence"], head["version"]) for name, head in heads.items()} == {
        "hybrid": (STEPS, STEPS + 1),
        "monitor": (0, 1),
    }


def test_loss_falls_and_reward_accuracy_rises(lived):
    *_, log = lived
    steps = [line for line in log if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert steps[0]["loss"] == pytest.approx(0.6931, abs=1e-3), "policy and reference are the same"
    assert steps[0]["rewards/accuracies"] == 0.0
    last = steps[EVERY:]
    assert fmean(line["loss"] for line in last) < steps[0]["loss"]
    assert fmean(line["rewards/margins"] for line in last) > 0.05
    assert fmean(line["rewards/accuracies"] for line in last) > 0.4
    assert all(0.5 < line["gamma"] < 1 for line in steps)


def test_prometheus_is_told_what_the_log_is(lived):
    *_, log = lived
    run = next(line["policy_version"] for line in reversed(log) if "policy_version" in line).rpartition("-")[0]

    def value(name, **labels):
        return metrics.REGISTRY.get_sample_value(f"inward_trainer_{name}", {"run": run, **labels})

    last = [line for line in log if "loss" in line][-1]
    assert (value("step"), value("steps_planned")) == (STEPS, STEPS)
    assert (value("loss"), value("log_ratio_nats"), value("confidence")) == tuple(
        last[n] for n in ("loss", "log_ratio", "gamma")
    )
    assert value("accuracy", judge="monitor") == last["monitor/accuracy"]
    first, *_, now = [line for line in log if "held_out/reward" in line]
    assert value("held_out_gain", judge="head") == now["held_out/reward"] - first["held_out/reward"]
    assert value("policy_info", version=f"{run}-{STEPS:06d}") == 1
    assert metrics.REGISTRY.get_sample_value("inward_trainer_pairs_total") >= STEPS * PAIRS
    assert metrics.REGISTRY.get_sample_value("inward_trainer_step_duration_seconds_count") >= STEPS


def test_fresh_samples_of_held_out_prompts_get_better_also_by_the_monitor(lived):
    *_, log = lived
    first, *_, last = [line for line in log if "held_out/reward" in line]
    assert (first["step"], last["step"]) == (0, STEPS)
    assert last["held_out/reward"] > first["held_out/reward"]
    assert last["held_out/monitor"] > first["held_out/monitor"]
