"""What is released, built, looked into and tried from the wheels, never from the checkout: ``make release``.

``release.py OUT`` writes into the folder ``OUT`` the three wheels; for each Python the list of wheels that an
installation without a network needs, with their hashes (``wheels-3.12.txt``, for ``pip download --require-hashes`` and
``pip install --no-index --find-links``); and the bill of materials of the service (``inward.cdx.json``, CycloneDX 1.6),
which scanners of vulnerabilities read. Then it installs the service into an environment of its own and has it answer.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PROJECTS = {"inward": ROOT, "inward_client": ROOT / "clients/python", "inward_trainer": ROOT / "clients/trainer"}
"""Package → where its distribution is described."""
PATIENCE_S = 300.0
LARGEST_BYTES = {"inward": 100 * 2**20, "inward_client": 2**20, "inward_trainer": 2**20}
"""Of a wheel: PyPI takes no more than a hundred MiB."""
NEVER = re.compile(r"(^|/)(tests?|shared)/|\.(pkl|pickle|pt|pth|bin|npy)$|(^|/)\.")
"""What is in no wheel: tests, pickles, hidden files."""


def versions() -> dict[str, str]:
    """Where a version stands → the version."""
    found = {}
    for package, folder in PROJECTS.items():
        found[f"{package}: pyproject.toml"] = tomllib.loads((folder / "pyproject.toml").read_text())["project"][
            "version"
        ]
        source = (ROOT / "service" / package if package == "inward" else folder / package) / "__init__.py"
        stated = re.search(r'^__version__ = "(.+)"$', source.read_text(), re.MULTILINE)
        if stated:  # else it is what the distribution's metadata say
            found[f"{package}: __version__"] = stated[1]
    places = {
        "deploy/k8s/Chart.yaml": r"^version: (.+)$",
        "deploy/env.example": r"^VERSION=(.+)$",
        "Dockerfile": r"^ARG VERSION=(.+)$",
        "docker-compose.yml": r"VERSION:-([^}]+)}",
        "CHANGELOG.md": r"^## ([\d.]+)",
    }
    for place, pattern in places.items():
        text = (ROOT / place).read_text(encoding="utf-8")
        for number, version in enumerate(dict.fromkeys(re.findall(pattern, text, re.MULTILINE))):
            if place != "CHANGELOG.md" or not number:  # the newest stands first
                found[f"{place} {number or ''}".strip()] = version
    return found


def build(out: Path) -> dict[str, Path]:
    """Package → its wheel."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.whl"):
        old.unlink()
    for folder in PROJECTS.values():
        run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out, folder)
    return {wheel.name.partition("-")[0]: wheel for wheel in sorted(out.glob("*.whl"))}


def check(package: str, wheel: Path) -> None:
    """A wheel of any Python from 3.11 on, typed, licensed, of a sensible size, with nothing in it that runs by itself.

    Raises:
        SystemExit: it is not so, and why.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    wanted = [f"{package}/py.typed", f"{package}/__init__.py"]
    problems = [f"there is no {name}" for name in wanted if name not in names]
    problems += [f"{name} is in it" for name in names if NEVER.search(name)]
    stated = ("Requires-Python: >=3.11", "License-Expression: Apache-2.0")
    problems += [f"the metadata have no {line!r}" for line in stated if line not in metadata]
    if not wheel.name.endswith("-py3-none-any.whl"):
        problems.append("it is not for any Python and machine")
    if wheel.stat().st_size > LARGEST_BYTES[package]:
        problems.append(f"it has {wheel.stat().st_size:,} bytes, more than {LARGEST_BYTES[package]:,}")
    if problems:
        raise SystemExit(f"{wheel.name}: {'; '.join(problems)}")
    print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB, {len(names)} files")


def resolved(python: Path, wheels: Mapping[str, Path]) -> list[dict[str, Any]]:
    """What pip would install for the service, as its report says."""
    command = [python, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    report = run(*command, wheels["inward"], wheels["inward_client"])
    installed: list[dict[str, Any]] = json.loads(report)["install"]
    return sorted(installed, key=lambda one: str(one["metadata"]["name"]).lower())


def offline_list(installed: list[dict[str, Any]]) -> str:
    """Requirements with hashes; those that come as our own wheels are left out."""
    lines = []
    for one in installed:
        hashes = one["download_info"].get("archive_info", {}).get("hashes", {})
        name = one["metadata"]["name"]
        if not str(one["download_info"]["url"]).startswith("file:"):
            lines.append(f"{name}=={one['metadata']['version']} --hash=sha256:{hashes['sha256']}")
    return "\n".join(lines) + "\n"


def materials(installed: list[dict[str, Any]], version: str) -> dict[str, Any]:
    """The bill of materials, as CycloneDX 1.6."""
    components = []
    for one in installed:
        about = one["metadata"]
        component: dict[str, Any] = {
            "type": "library", "name": about["name"], "version": about["version"],
            "purl": f"pkg:pypi/{re.sub(r'[-_.]+', '-', about['name']).lower()}@{about['version']}",
        }  # fmt: skip
        if sha256 := one["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256"):
            component["hashes"] = [{"alg": "SHA-256", "content": sha256}]
        if licence := about.get("license_expression"):
            component["licenses"] = [{"expression": licence}]
        elif licence := (about.get("license") or "").partition("\n")[0][:80]:
            component["licenses"] = [{"license": {"name": licence}}]
        components.append(component)
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {"type": "application", "name": "inward", "version": version}},
        "components": components,
    }


@contextmanager
def environment(python: str) -> Iterator[Path]:
    """The Python of a fresh virtual environment."""
    with tempfile.TemporaryDirectory() as folder:
        run(python, "-m", "venv", folder)
        yield Path(folder) / "bin/python"


def smoke(python: Path, *, model: bool) -> None:
    """The installed service answers: with a model it scores a pair, without one it says that it waits for Redis.

    Raises:
        SystemExit: it doesn't.
    """
    with tempfile.TemporaryDirectory() as folder:
        said = _smoke(python, Path(folder), model)
    print(f"{said} answers as {'inward[standard]' if model else 'inward'} on {run(python, '--version').strip()}")


def _smoke(python: Path, home: Path, model: bool) -> str:
    env = {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}", "HOME": str(home), "INWARD_PORT": "0"}
    env |= {"INWARD_MODEL": "toy", "INWARD_REDIS_URL": "redis://127.0.0.1:1/0", "OMP_NUM_THREADS": "1"}
    said = run(python.parent / "inward", "--version", env=env, cwd=home)
    run(python.parent / "inward", "keys", "new", "a", "--api-keys-file", home / "keys.yaml", env=env, cwd=home)
    with (home / "log").open("w") as log:
        command = [python.parent / "inward", "serve" if model else "api"]
        server = subprocess.Popen(command, env=env, cwd=home, stderr=log)
        try:
            url = _until_serving(server, home / "log")
            if model:
                pair = {"prompt": "Hi", "chosen": "Hello!", "rejected": "Go away."}
                answer = _ask(f"{url}/margin", {"pairs": [pair]})
                if not isinstance(answer["margins"][0]["margin"], float):
                    raise SystemExit(f"no margin: {answer}")
            elif "Redis" not in _ask(f"{url}/readyz")["error"]["message"]:
                raise SystemExit("/readyz does not say that Redis is away")
        finally:
            server.terminate()
            status = server.wait(PATIENCE_S)
    if status:
        raise SystemExit(f"it ended with {status}: {(home / 'log').read_text()[-2000:]}")
    return said.strip()


def _until_serving(server: subprocess.Popen[bytes], log: Path) -> str:
    end = time.monotonic() + PATIENCE_S
    while server.poll() is None and time.monotonic() < end:
        for line in log.read_text().splitlines():
            if '"ready"' in line:
                return str(json.loads(line)["url"])
        time.sleep(0.2)
    raise SystemExit(f"it does not serve: {log.read_text()[-2000:]}")


def _ask(url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        return json.load(error)


def run(*command: Any, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    """Standard output of a command that has to succeed."""
    variables = dict(os.environ if env is None else env)
    variables.pop("PYTHONPATH", None)
    done = subprocess.run(
        [str(word) for word in command], env=variables, cwd=cwd, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} ended with {done.returncode}")
    return done.stdout


def main(arguments: argparse.Namespace) -> None:
    """All of it."""
    stated = set(versions().values())
    if len(stated) > 1:
        raise SystemExit("the versions differ: " + ", ".join(f"{place} {v}" for place, v in versions().items()))
    (version,) = stated
    if arguments.tag not in (None, f"v{version}"):
        raise SystemExit(f"the tag {arguments.tag} is not v{version}")
    wheels = build(arguments.out)
    for package in PROJECTS:
        check(package, wheels[package])
    for name in arguments.python or [sys.executable]:
        with environment(name) as python:
            installed = resolved(python, wheels)
            number = ".".join(run(python, "--version").split()[1].split(".")[:2])
            (arguments.out / f"wheels-{number}.txt").write_text(offline_list(installed))
            (arguments.out / "inward.cdx.json").write_text(json.dumps(materials(installed, version), indent=2) + "\n")
            run(python, "-m", "pip", "install", "--quiet", wheels["inward"], wheels["inward_client"])
            smoke(python, model=False)
            if arguments.standard:
                extra = f"{wheels['inward']}[standard]"
                run(python, "-m", "pip", "install", "--quiet", *arguments.standard, extra, wheels["inward_client"])
                smoke(python, model=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tag", help="has to be v and the version")
    parser.add_argument("--python", nargs="*", help="those that it is tried on; by default this one")
    parser.add_argument("--standard", nargs="*", metavar="TORCH", help="try inward[standard] too, beside these")
    main(parser.parse_args())
