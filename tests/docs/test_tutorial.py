import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TUTORIAL = Path(__file__).parents[2] / "docs/tutorial.py"
TOPICS = ("locks", "cars", "bread", "knives", "cards", "trains", "paint", "rope")


def test_the_tutorial_runs_as_written(tmp_path):
    pytest.importorskip("trl", reason="TRL is not installed: pip install ./clients/trainer")
    path = tmp_path / "pairs.jsonl"
    turns = "\\n\\nHuman: Question {n} about {topic}?\\n\\nAssistant: "
    row = '{{"chosen": "' + turns + 'I would ask first.", "rejected": "' + turns + "Just take it." + '"}}\n'
    path.write_text("".join(row.format(n=n, topic=topic) for n in range(5) for topic in TOPICS))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "TMPDIR": str(tmp_path),
    }
    command = [sys.executable, str(TUTORIAL), str(path), "--model", "toy", "--rows", "256", "--seeds", "0"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "40 of 40 pairs annotated" in done.stdout
    found = dict(re.findall(r"^(no margin|margin|constant) +(\d\.\d+) ", done.stdout, re.M))
    assert set(found) == {"no margin", "margin", "constant"}
    assert all(0 <= float(value) <= 1 for value in found.values())
