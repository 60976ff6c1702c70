"""What building and starting the service's image comes to, without an engine: ``make image-check``.

Replays the ``build`` stage of the Dockerfile in a folder of its own (COPY copies, RUN runs, ``/srv/inward`` and
``/src`` lie in it), then starts the entry point with the image's variables, as the image's user where we may become it,
and asks its health check.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
UID = 10001


def stages(dockerfile: Path) -> dict[str, list[tuple[str, str]]]:
    """Stage → its (instruction, arguments), with continued lines joined; arguments of FROM name the stage."""
    text = re.sub(
        r"\\\n", " ", "\n".join(line for line in dockerfile.read_text().splitlines() if not line.startswith("#"))
    )
    found: dict[str, list[tuple[str, str]]] = {"": []}
    stage = ""
    for line in filter(str.strip, text.splitlines()):
        instruction, _, arguments = line.strip().partition(" ")
        if instruction == "FROM":
            stage = arguments.split(" AS ")[1]
            found[stage] = []
        else:
            found[stage].append((instruction, " ".join(arguments.split())))
    return found


def variables(instructions: list[tuple[str, str]]) -> dict[str, str]:
    """What ENV and ARG (with its default) set."""
    return dict(
        pair.partition("=")[::2]
        for kind, arguments in instructions
        if kind in {"ENV", "ARG"}
        for pair in shlex.split(arguments)
        if "=" in pair
    )


def build(folder: Path, arguments: dict[str, str]) -> None:
    """The stage ``build``."""
    instructions = stages(ROOT / "Dockerfile")["build"]
    places = {"/srv/inward": f"{folder}/srv/inward", "/src": f"{folder}/src"}
    env = {
        **os.environ,
        **variables(instructions),
        **arguments,
        "PATH": f"{folder}/srv/inward/bin:{os.environ['PATH']}",
    }
    env.pop("PYTHONPATH", None)
    (folder / "src").mkdir()
    for kind, rest in instructions:
        if kind == "COPY":
            *sources, target = rest.split()
            for source in sources:
                to = folder / "src" / target / ("" if (ROOT / source).is_dir() and target != "./" else source)
                copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                copy(ROOT / source, to, **({"dirs_exist_ok": True} if copy is shutil.copytree else {}))
        elif kind == "RUN":
            for place, here in places.items():
                rest = rest.replace(place, here)
            print("+", rest, flush=True)
            subprocess.run(
                ["sh", "-ec", rest.replace("python -m venv", f"{sys.executable} -m venv")],
                cwd=folder / "src",
                env=env,
                check=True,
            )


def start(folder: Path) -> None:
    """``inward serve`` as the image would start it; answers once, is healthy, and ends with 0."""
    every = stages(ROOT / "Dockerfile")
    env = variables(every["base"]) | variables(every["service"])
    home = folder / "home"
    home.mkdir()
    (folder / "tmp").mkdir(mode=0o1777)
    env = {name: value.replace("/var/lib/inward", str(home)) for name, value in env.items()}
    env |= {
        "PATH": f"{folder}/srv/inward/bin:{os.environ['PATH']}",
        "TMPDIR": str(folder / "tmp"),
        "MPLCONFIGDIR": str(folder / "tmp"),
    }
    env |= {"INWARD_MODEL": "toy", "INWARD_HOST": "127.0.0.1", "INWARD_PORT": "0", "INWARD_API_KEYS": "a-key"}
    folder.chmod(0o755)
    become = _nobody(folder)
    if become:
        os.chown(home, UID, UID)
    entry = dict(every["service"])
    command = json.loads(entry["ENTRYPOINT"]) + json.loads(entry["CMD"])
    check = json.loads(next(rest for kind, rest in every["service"] if kind == "HEALTHCHECK").partition("CMD ")[2])
    with (folder / "log").open("w+") as log:
        server = subprocess.Popen(command, env=env, cwd=home, stderr=log, **become)
        try:
            url = _wait_until_ready(server, folder / "log")
            subprocess.run(check, env=env | {"INWARD_PORT": url.rpartition(":")[2]}, check=True, **become)
        finally:
            server.terminate()
            status = server.wait(300)
    if status:
        raise SystemExit(f"inward serve ended with {status}")
    print(
        f"started as user {UID} who can write to its home only, healthy, stopped with 0"
        if become
        else "started, healthy, stopped with 0"
    )


def _nobody(folder: Path) -> dict[str, Any]:
    """How to become the image's user; nothing where we are not root, or where that user can't reach this Python (one
    below /root)."""
    become = {"user": UID, "group": UID, "extra_groups": []}
    try:
        subprocess.run([folder / "opt/inward/bin/python", "-c", ""], check=True, **become)
    except (OSError, subprocess.CalledProcessError):
        return {}
    return become


def _wait_until_ready(server: subprocess.Popen[bytes], log: Path) -> str:
    while server.poll() is None:
        for line in log.read_text().splitlines():
            if '"ready"' in line:
                return str(json.loads(line)["url"])
        time.sleep(0.2)
    raise SystemExit(log.read_text())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        build(Path(made), dict(pair.split("=", 1) for pair in sys.argv[1:]))
        start(Path(made))
