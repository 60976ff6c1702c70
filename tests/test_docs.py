"""The commands that the runbook and the operations guide tell people to type, typed against real processes around a
real Redis."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from inward import codec
from inward.processes.wiring import TOY
from inward.stores.keys import Keys
from inward.types import Group, Job
from support.fleet import Fleet
from support.waiting import PATIENCE

ROOT = Path(__file__).parents[1]
KEY = "a-key-of-some-length"
STAYS = re.compile(r"inward (serve|api|worker)\b")
"""What does not end by itself: it has to say that it is ready."""
ELSEWHERE = {
    "deploy/smoke.sh": "takes minutes: make smoke runs it",
    "pip": "the test's own environment has the extra already, or leaves it out on purpose",
}


def commands(document: str) -> list[str]:
    """Each command of a document's shell blocks, without its comment; those with an ellipsis are no commands."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / document).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks, f"{document} has no shell blocks"
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(re.sub(r"\s{2,}# .*", "", line).split()) for line in lines if line.strip() and "…" not in line]


@pytest.fixture(scope="module")
def place(tmp_path_factory, _shared_redis):
    """A working folder, and what stands for the names that the documents use."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "bin").mkdir()
    (folder / "keys").write_text(f"{KEY}\n")
    (folder / "bin/inward").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m inward "$@"\n')
    (folder / "bin/inward").chmod(0o755)
    (folder / "bin/python").symlink_to(sys.executable)
    shutil.copytree(TOY / "heads", folder / "heads")
    shutil.copytree(TOY / "heads", folder / "restored")
    shutil.copytree(ROOT / "deploy/prometheus", folder / "deploy/prometheus")
    with _shared_redis.client() as client:
        client.flushall()
    with pytest.MonkeyPatch.context() as patch, Fleet(folder, _shared_redis.url, demo=True) as fleet:
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))
        patch.setenv("INWARD_MODEL", "toy")
        patch.setenv("INWARD_BACKBONE", "fake")  # the commands are what is tested, and not what a model says
        api, worker = fleet.api("--api-keys-file", str(folder / "keys")), fleet.worker()
        fleet.wait_until_ready(api, worker)
        names = {"API": api.url, "KEY": KEY, "WORKER": worker.url, "REDIS": _shared_redis.url}
        path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        yield (
            folder,
            {**os.environ, **names, "PATH": path, "PYTHONPATH": os.pathsep.join(sys.path), "INWARD_PORT": "0"},
            _shared_redis,
        )


@pytest.mark.parametrize(
    ("document", "command"),
    [(document, command) for document in ("runbook.md", "operations.md") for command in commands(document)],
)
def test_a_command_of_the_documents_does_what_it_says(document, command, place):
    folder, environment, redis = place
    word = next(word for word in command.split() if "=" not in word)
    if word in ELSEWHERE:
        pytest.skip(f"{word}: {ELSEWHERE[word]}")
    if shutil.which(word, path=environment["PATH"]) is None:
        pytest.skip(f"there is no {word} on this machine")
    if "ENTRY" in command:
        command = command.replace("ENTRY", dead_letter(redis))
    command = command.replace("redis://:password@host:6379/0", redis.url).replace(
        "--model M", f"--model {TOY / 'backbone'}"
    )
    if STAYS.search(command):
        stays(command, folder, environment)
        return
    shell = ["bash", "-euc", command]  # no pipefail: `head` may close its end early
    done = subprocess.run(shell, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr + done.stdout
    if command.startswith("curl"):
        assert '"error"' not in done.stdout and done.stdout.strip()


def dead_letter(redis) -> str:
    """Its entry, as `inward dead-letters list` shows it."""
    job = codec.encode(Job("a", Group((9, 8, 7), ((6, 5),)), ("legend",)))
    with redis.client() as client:
        entry = client.xadd(
            Keys("toy").dead,
            {"id": "a", "to": "", "job": job, "reason": "3 workers ended", "deliveries": 4, "queue": 1},
        )
    return entry.decode() if isinstance(entry, bytes) else entry


def stays(command: str, folder: Path, environment: dict[str, str]) -> None:
    """It says that it is ready, and ends well when it is told to."""
    process = subprocess.Popen(
        ["bash", "-c", f"exec env {command}"], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True
    )
    impatient = threading.Timer(PATIENCE, process.kill)
    impatient.start()
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("{") and json.loads(line)["event"] == "ready":
                break
        else:
            raise AssertionError(f"{command}: ended with {process.wait()}")
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=2 * PATIENCE)
        assert process.returncode == 0
    finally:
        impatient.cancel()
        process.kill()
        process.wait()
