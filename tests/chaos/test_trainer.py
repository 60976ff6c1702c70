"""The trainer and the service are killed in turns, at random moments, until the run is over. At full size only: it
takes minutes.

``make chaos``; INWARD_CHAOS_SEED repeats a run's moments.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from contextlib import ExitStack

import httpx
import pytest

from inward_trainer.logs import read_log
from support.redis_server import free_port
from support.serving import started
from support.small_policy import write_rows

STEPS, BATCH, EVERY, DEATHS = 18, 2, 3, 8


@pytest.mark.skipif(os.environ.get("INWARD_CHAOS") != "full", reason="takes minutes: make chaos")
def test_a_loop_whose_halves_die_again_and_again_uses_each_pair_and_applies_each_update_once(tmp_path):
    seed = int(os.environ.get("INWARD_CHAOS_SEED") or random.randrange(10**6))
    print(f"INWARD_CHAOS_SEED={seed}")
    moments, address = random.Random(seed), ("--port", str(free_port()))
    (tmp_path / "adapters").mkdir()
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"How do I open lock {i}?"} for i in range(100)])
    url, log = f"http://127.0.0.1:{address[1]}", tmp_path / "run/log.jsonl"
    command = [
        sys.executable, "-m", "inward_trainer", "cdpo", "--model", "service", "--url", url, "--out", tmp_path / "run",
        "--source", "samples", "--prompts", prompts, "--samples", 4, "--sampling", '{"max_tokens": 16}',
        "--steps", STEPS, "--batch-size", BATCH, "--adapters", tmp_path / "adapters", "--publish-every", EVERY,
        "--update-head", "--learning-rate", 1e-3,
    ]  # fmt: skip

    def serve():
        return stack.enter_context(
            started(
                *address,
                "--model",
                "toy",
                "--adapters",
                str(tmp_path / "adapters"),
                env={"XDG_STATE_HOME": str(tmp_path / "state")},
            )
        )

    def train():
        with (tmp_path / "train.log").open("a") as said:
            process = subprocess.Popen(
                [str(word) for word in command],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
                stdout=said,
                stderr=said,
            )
        stack.callback(process.kill)
        return process

    with ExitStack() as stack:
        service, trainer = serve(), train()
        for death in range(DEATHS):
            time.sleep(moments.uniform(0, 1))
            wait = len(read_log(log)) + moments.randint(0, 2)
            end = time.monotonic() + 600
            while len(read_log(log)) <= wait and trainer.poll() is None and time.monotonic() < end:
                time.sleep(0.02)
            if trainer.poll() is not None:
                break
            if death % 2:
                service.process.kill()
                service.process.wait()
                service = serve()
            else:
                trainer.kill()
                trainer.wait()
                trainer = train()
        assert trainer.wait(timeout=1200) == 0, (tmp_path / "train.log").read_text()[-3000:]
        steps = [line for line in read_log(log) if "loss" in line]
        head = httpx.get(f"{url}/heads/hybrid", timeout=60).json()
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    used = [pair for line in steps for pair in line["pairs"]]
    assert len(used) == len(set(used)) == STEPS * BATCH
    assert (head["sequence"], head["version"]) == (STEPS, STEPS + 1)
    assert sorted(path.name.rpartition("-")[2] for path in (tmp_path / "adapters").iterdir()) == [
        f"{step:06d}" for step in range(EVERY, STEPS + 1, EVERY)
    ]
