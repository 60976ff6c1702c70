"""The recipes in ``examples`` that need no trainer, as they stand there."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from support.serving import FRESH

EXAMPLES = Path(__file__).parents[1] / "examples"


def rows(n):
    return [
        {"id": str(i), "prompt": f"How do I open a jar {i}?", "chosen": "Turn the lid.", "rejected": f"No. {i}"}
        for i in range(n)
    ]


def test_datatrove_annotates_pairs_at_a_service(demo_server, tmp_path):
    pytest.importorskip("datatrove", reason="datatrove is not installed: pip install datatrove orjson")
    pytest.importorskip("orjson", reason="datatrove reads JSON with orjson: pip install orjson")
    (tmp_path / "in").mkdir()
    for part in range(2):
        lines = (json.dumps(row) for row in rows(80)[part::2])
        (tmp_path / f"in/{part}.jsonl").write_text("\n".join(lines) + "\n")
    main = runpy.run_path(str(EXAMPLES / "datatrove_margins.py"))["main"]
    main(["--input", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--url", demo_server.url, "--tasks", "2"])
    files = sorted((tmp_path / "out").glob("*.jsonl"))
    assert len(files) == 2
    got = {row["id"]: row for file in files for row in map(json.loads, file.read_text().splitlines())}
    assert sorted(got, key=int) == [str(i) for i in range(80)]
    assert all(isinstance(row["margin"], float) and row["label_agrees"] == (row["margin"] > 0) for row in got.values())
    assert got["3"]["chosen"] == "Turn the lid."


def test_a_slurm_task_annotates_the_file_of_its_number_once(tmp_path):
    """Two files of one name in two folders; the array is submitted again."""
    files = [tmp_path / folder / "pairs.jsonl" for folder in ("a", "b")]
    for n, file in zip((4, 6), files, strict=True):
        file.parent.mkdir()
        file.write_text("".join(json.dumps(row) + "\n" for row in rows(n)))
    (tmp_path / "files.txt").write_text(f"{files[0]}\nb/pairs.jsonl\n")
    (tmp_path / "inward").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m inward "$@" --backbone fake\n')
    (tmp_path / "inward").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = os.environ | FRESH | {"PATH": path, "PYTHONPATH": os.pathsep.join(sys.path)}

    def task(number):
        return subprocess.run(
            ["bash", str(EXAMPLES / "annotate.sbatch"), "files.txt", "out", "toy"],
            cwd=tmp_path,
            env=environment | {"SLURM_ARRAY_TASK_ID": number},
            check=False,
            capture_output=True,
        )

    for number in "12":
        assert (done := task(number)).returncode == 0, done.stderr
    written = [tmp_path / f"out{file}" for file in files]
    assert [len(one.read_text().splitlines()) for one in written] == [4, 6]
    before = [one.stat().st_mtime_ns for one in written]
    again = task("2")
    assert again.returncode == 0 and b"is finished" in again.stdout, again.stderr
    assert [one.stat().st_mtime_ns for one in written] == before
    third = task("3")
    assert third.returncode == 2 and b"no line 3" in third.stderr
