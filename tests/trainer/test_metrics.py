import json
import math

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from inward_trainer import cdpo, metrics
from inward_trainer.errors import OptionsError
from inward_trainer.logs import Log
from support.fake_inward import FakeInward, served
from support.redis_server import free_port
from support.small_policy import ends_after, options, rows, write_policy, write_rows


def value(name, **labels):
    return metrics.REGISTRY.get_sample_value(name, labels)


def test_what_was_not_measured_is_absent_and_what_is_no_number_is_not_zero(tmp_path):
    log = Log(tmp_path, 0, run="absent", tensorboard=False)
    assert value("inward_trainer_loss", run="absent") is None
    log.write(1, {"loss": 0.5, "monitor/accuracy": 0.25, "pairs": ["a"], "something_new": 1.0})
    assert value("inward_trainer_loss", run="absent") == 0.5
    assert value("inward_trainer_accuracy", run="absent", judge="monitor") == 0.25
    assert value("inward_trainer_accuracy", run="absent", judge="head") is None
    log.write(2, {"loss": math.nan})
    assert math.isnan(value("inward_trainer_loss", run="absent"))


def test_gain_is_against_the_first_policy_of_the_run_even_after_a_restart(tmp_path):
    log = Log(tmp_path, 0, run="gain", tensorboard=False)
    log.write(0, {"policy_version": "base", "held_out/reward": 1.0, "held_out/monitor": 3.0})
    log.write(5, {"policy_version": "gain-000005", "held_out/reward": 1.5, "held_out/monitor": 2.0})
    for _ in range(2):
        assert value("inward_trainer_held_out_reward", run="gain", judge="head") == 1.5
        assert value("inward_trainer_held_out_gain", run="gain", judge="head") == 0.5
        assert value("inward_trainer_held_out_gain", run="gain", judge="monitor") == -1.0
        assert value("inward_trainer_policy_info", run="gain", version="gain-000005") == 1
        assert value("inward_trainer_policy_info", run="gain", version="base") is None
        for gauge in (metrics.HELD_OUT, metrics.HELD_OUT_GAIN, metrics.POLICY_INFO):
            gauge.clear()  # as in a new process
        log = Log(tmp_path, 5, run="gain", tensorboard=False)


def test_a_run_is_complete_where_its_source_ends(tmp_path, monkeypatch):
    """Prometheus can't else tell it from one that died. Five prompts were planned as three steps of two pairs."""
    ends_after(monkeypatch, 4)
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in rows(5)])
    with served(FakeInward()) as url:
        run = options(
            model=str(write_policy(tmp_path / "model")),
            url=url,
            source="samples",
            prompts=prompts,
            samples=4,
            out=tmp_path / "short",
        )
        assert cdpo.run(run) == 0
    name = json.loads((tmp_path / "short/run.json").read_text())["name"]
    assert value("inward_trainer_step", run=name) == value("inward_trainer_steps_planned", run=name) == 2


def test_metrics_are_served_until_they_are_stopped():
    port = free_port()
    stop = metrics.serve("127.0.0.1", port)
    try:
        with pytest.raises(OptionsError, match=rf"--metrics-port {port} on 127.0.0.1: .*in use"):
            metrics.serve("127.0.0.1", port)
        families = text_string_to_metric_families(httpx.get(f"http://127.0.0.1:{port}/metrics").raise_for_status().text)
        assert {"inward_trainer_pairs", "inward_trainer_step", "process_resident_memory_bytes"} <= {
            family.name for family in families
        }
    finally:
        stop()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/metrics")
