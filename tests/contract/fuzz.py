"""Requests that a machine thinks of, against a real server: no 5xx, and no answer that the OpenAPI document does not
allow.

``make fuzz`` runs it; it is no part of the tests, because it takes minutes.

    python tests/contract/fuzz.py --examples 500
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from inward.processes.wiring import TOY
from support.fleet import Fleet
from support.redis_server import RedisServer
from support.serving import started

HEADS = ("hybrid", "legend")
RENDERED = ("query", "prompts", "input", "messages", "prompt", "response", "candidates")
"""Fields of texts that trainers render, or that spell what a template writes."""
CONFIGURATION = """
[checks]
not_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", "504"]
"""
"""504 is right where a request gives itself a timeout of next to nothing, as some of these do."""
HOOKS = f"""
import json
import schemathesis

HEADS = {HEADS!r}
RENDERED = {RENDERED!r}

def real(name):
    return name if len(name) % 4 == 0 else HEADS[len(name) % 2]

@schemathesis.serializer("application/x-ndjson")
def rows(ctx, value):
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    pair = {{"prompt": text, "chosen": text, "rejected": "b"}}
    return (text if len(text) % 2 else json.dumps(pair)).encode(errors="replace")

MARKS = ("<s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "\\n", " ", "")

def rendered(text):
    marks = [MARKS[ord(c) % len(MARKS)] for c in text[:8]]
    whole = f"<s><|user|>{{text}}<|end|><|assistant|>{{text[::-1]}}<|end|>"
    mixed = "".join(mark + text for mark in marks)
    return (text, whole, whole + "".join(marks), "".join(marks) + whole, mixed)[len(text) % 5]

def spelled(value):
    if isinstance(value, str):
        return rendered(value)
    return [spelled(one) if isinstance(one, str) else one for one in value] if isinstance(value, list) else value

@schemathesis.hook
def map_body(ctx, body):
    if not isinstance(body, dict):
        return body
    body = {{name: spelled(value) if name in RENDERED else value for name, value in body.items()}}
    return {{**body, "head": real(body["head"])}} if isinstance(body.get("head"), str) else body

@schemathesis.hook
def map_path_parameters(ctx, path_parameters):
    if path_parameters and isinstance(path_parameters.get("name"), str):
        return {{**path_parameters, "name": real(path_parameters["name"])}}
    return path_parameters
"""
"""Most names become those of heads that are loaded, so that the requests get further than to a 404; many texts have the
marks that the chat template writes around turns, in order and out of it."""
PATIENCE_S = 120
"""For an answer of a busy machine; schemathesis itself waits ten seconds."""
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The service on its fake backbone with the demonstration's heads; around a Redis, where there is one, so that
    it has bulk jobs."""
    redis = RedisServer(folder)
    if redis.binary is None:
        with started("--backbone", "fake", env={"XDG_STATE_HOME": str(folder)}) as served:
            yield served.url
        return
    shutil.copytree(TOY / "backbone", folder / "model")
    shutil.copytree(TOY / "heads", folder / "heads")
    with Fleet(folder, redis.start().url) as fleet:
        api, worker = fleet.api(), fleet.worker()
        fleet.wait_until_ready(api, worker)
        yield api.url
    redis.kill()


def main() -> int:
    """Exit status of schemathesis, and 1 if fewer requests were sent than asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=500, help="for each operation")
    parser.add_argument("--least", type=int, default=0, help="fail if fewer requests were sent in all")
    parser.add_argument("--seed", type=int, default=None)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as state, serving(Path(state)) as url:
        folder = Path(state)
        (folder / "schemathesis.toml").write_text(CONFIGURATION)
        (folder / "hooks.py").write_text(HOOKS)
        (folder / "openapi.json").write_bytes(httpx.get(f"{url}/openapi.json", timeout=PATIENCE_S).content)
        seed = [] if args.seed is None else ["--seed", str(args.seed)]
        command = [
            str(Path(sys.executable).with_name("schemathesis")), "run", "openapi.json", "--url", url,
            "--checks", CHECKS, "--request-timeout", str(PATIENCE_S),
            "--max-examples", str(args.examples), "--phases", "examples,coverage,fuzzing", "--continue-on-failure",
            "--suppress-health-check", "all", *seed,
        ]  # fmt: skip
        environment = os.environ | {"SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": state}
        status = subprocess.run(command, cwd=state, check=False, env=environment).returncode
        with httpx.Client(base_url=url, timeout=PATIENCE_S) as client:
            sent = sum(
                float(line.rsplit(" ", 1)[1]) for line in client.get("/metrics").text.splitlines() if _is_count(line)
            )
            alive = client.get("/livez").status_code == 200
    print(f"{sent:.0f} requests were sent; the server is {'alive' if alive else 'DEAD'}")
    return status or int(sent < args.least or not alive)


def _is_count(line: str) -> bool:
    return line.startswith("inward_requests_total{")


if __name__ == "__main__":
    raise SystemExit(main())
