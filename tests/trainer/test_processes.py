"""Several processes, as ``accelerate launch`` and ``torchrun`` start them: they share out every step's pairs, learn
what one would, and end together."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from inward_trainer import cdpo
from inward_trainer.__main__ import main
from inward_trainer.checkpoints import last_checkpoint
from inward_trainer.logs import read_log
from support.fake_inward import FakeInward, served
from support.small_policy import options, rows, write_policy, write_rows

LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "inward_trainer"]


def launched(**options):
    """Two processes of ``inward-train cdpo``."""
    quick = {"batch-size": 1, "max-length": 128, "lora-rank": 4} | options
    words = [word for name, value in quick.items() for word in (f"--{name}", str(value))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *LAUNCH, "cdpo", *words, "--no-bf16", "--no-tensorboard"]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def test_two_processes_learn_what_one_does(tmp_path):
    policy = write_policy(tmp_path / "policy")
    pairs = write_rows(tmp_path / "pairs.jsonl", [row | {"confidence": 0.6 + i / 40} for i, row in enumerate(rows(12))])
    judged = write_rows(tmp_path / "eval.jsonl", [row | {"confidence": 0.9} for row in rows(3)])
    shape = {"pairs": pairs, "accumulate": 2, "eval_pairs": judged}
    alone = options(model=str(policy), out=tmp_path / "one", batch_size=2, checkpoint_every=2, **shape)
    cdpo.run(alone)
    process = launched(
        model=policy, pairs=pairs, out=tmp_path / "two", accumulate=2,
        **{"learning-rate": alone.learning_rate, "checkpoint-every": 2, "eval-pairs": judged},
    )  # fmt: skip
    try:
        _, said = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 0, said[-3000:]
    one, two = (read_log(tmp_path / name / "log.jsonl") for name in ("one", "two"))
    assert [line.get("pairs") for line in two] == [line.get("pairs") for line in one]
    for name in ("loss", "grad_norm", "rewards/margins", "gamma", "eval/loss", "eval/loss_se"):
        found = [[line[name] for line in lines if name in line] for lines in (one, two)]
        assert found[0] and found[1] == pytest.approx(found[0], rel=1e-6 if "loss" in name else 1e-3, abs=1e-6), name
    assert (tmp_path / "two/best/adapter_model.safetensors").is_file()


def test_processes_that_wait_for_the_service_end_together_with_a_checkpoint(tmp_path):
    fake, waiting, over = FakeInward(), threading.Event(), threading.Event()
    original = fake.answer

    def silent(method, path, body):
        if path == "/rerank" and len(fake.drawn) >= 4:
            waiting.set()
            over.wait(600)
        return original(method, path, body)

    fake.answer = silent
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in rows(20)])
    with served(fake) as url:
        process = launched(
            model=write_policy(tmp_path / "policy"), url=url, out=tmp_path / "run", source="samples", prompts=prompts,
            samples=4, steps=8,
        )  # fmt: skip
        try:
            assert waiting.wait(300), process.kill() or process.communicate()[1][-3000:]
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=300)
        finally:
            over.set()
            process.kill()
    assert process.returncode != 0
    assert "inward-train cdpo: stopped by SIGTERM, step 2 of 8 is kept" in said, said[-3000:]
    assert last_checkpoint(tmp_path / "run/checkpoints").name == "checkpoint-2"
    assert not (tmp_path / "run/final").exists()


@pytest.mark.parametrize("several", [True, False])
def test_one_of_several_processes_ends_at_once_with_its_status(several, monkeypatch, tmp_path):
    ended = []
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: several)
    monkeypatch.setattr("os._exit", ended.append)
    missing = str(tmp_path / "nothing.jsonl")
    assert main(["cdpo", "--model", str(tmp_path), "--pairs", missing, "--out", str(tmp_path / "run")]) == 2
    assert ended == ([2] if several else [])
