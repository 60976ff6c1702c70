"""A real ``kill -9`` of a real process, between a stream in a real Redis and its checkpoints."""

import json
import os
import subprocess
import sys
import time

from inward_trainer.logs import read_log
from support.small_policy import rows, write_policy

KEY, GROUP = "inward:{tiny}:scores:pairs", "trainer"
STEPS, BATCH = 8, 2


def append(client, some):
    return [client.xadd(KEY, {"row": json.dumps(row | {"confidence": 0.9})}).decode() for row in some]


def trainer(policy, out, url):
    words = {
        "model": policy, "out": out, "source": "stream", "redis-url": url, "queue": "tiny", "steps": STEPS,
        "batch-size": BATCH, "checkpoint-every": 2, "max-length": 128, "lora-rank": 4, "patience": 120,
    }  # fmt: skip
    options = [word for name, value in words.items() for word in (f"--{name}", str(value))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "inward_trainer", "cdpo", *options, "--no-tensorboard", "--no-bf16"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_until(done, process, timeout=300):
    end = time.monotonic() + timeout
    while not done():
        assert process.poll() is None, process.stderr.read()[-2000:]
        assert time.monotonic() < end
        time.sleep(0.05)


def test_no_pair_of_a_stream_is_lost_or_used_twice(redis_server, tmp_path):
    policy, out, pairs = write_policy(tmp_path / "policy"), tmp_path / "run", rows(STEPS * BATCH)
    with redis_server.client() as client:
        entries = append(client, pairs[:11])
        process = trainer(policy, out, redis_server.url)
        try:  # five steps and half a pair of the sixth, of which the last checkpoint holds four
            wait_until(lambda: len(read_log(out / "log.jsonl")) == 5, process)
            wait_until(lambda: client.xinfo_groups(KEY)[0]["last-delivered-id"].decode() == entries[10], process)
            wait_until(lambda: client.xpending(KEY, GROUP)["pending"] == 3, process)
        finally:
            process.kill()
            process.communicate()
        entries += append(client, pairs[11:])
        process = trainer(policy, out, redis_server.url)
        try:
            _, said = process.communicate(timeout=300)
        finally:
            process.kill()
            process.communicate()
        assert process.returncode == 0, said[-2000:]
        lines = [line for line in read_log(out / "log.jsonl") if "loss" in line]
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        assert [entry for line in lines for entry in line["pairs"]] == entries
        assert client.xpending(KEY, GROUP)["pending"] == 0
    assert (out / "final/adapter_model.safetensors").is_file()
