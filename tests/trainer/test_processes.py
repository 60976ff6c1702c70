"""Several processes, as ``accelerate launch`` and ``torchrun`` start them: they share out every step's pairs, and
learn what one would."""

import os
import subprocess
import sys

import pytest

from inward_trainer import cdpo
from inward_trainer.logs import read_log
from support.small_policy import options, rows, write_policy, write_rows


def test_two_processes_learn_what_one_does(tmp_path):
    policy = write_policy(tmp_path / "policy")
    pairs = write_rows(tmp_path / "pairs.jsonl", [row | {"confidence": 0.6 + i / 40} for i, row in enumerate(rows(12))])
    alone = options(
        model=str(policy), pairs=pairs, out=tmp_path / "one", batch_size=2, accumulate=2, checkpoint_every=2
    )
    cdpo.run(alone)
    words = {
        "model": policy, "pairs": pairs, "out": tmp_path / "two", "batch-size": 1, "accumulate": 2,
        "checkpoint-every": 2, "learning-rate": alone.learning_rate, "max-length": 128, "lora-rank": 4,
    }  # fmt: skip
    given = [word for name, value in words.items() for word in (f"--{name}", str(value))]
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "inward_trainer",
        "cdpo",
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *given, "--no-bf16"], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = ([line for line in read_log(tmp_path / name / "log.jsonl") if "loss" in line] for name in ("one", "two"))
    assert [line["pairs"] for line in two] == [line["pairs"] for line in one]
    for name in ("loss", "grad_norm", "rewards/margins", "gamma"):
        assert [line[name] for line in two] == pytest.approx([line[name] for line in one], rel=1e-3, abs=1e-5), name
