"""What nginx logs of a request: its route and how it went, and nothing that a caller can write into it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest

from inward.api.app import PATHS
from support.redis_server import free_port
from support.waiting import PATIENCE, wait_until

CONFIG = Path(__file__).parents[2] / "deploy/nginx.conf"
MARKER = "zanzibar4711"


def routes() -> list[tuple[str, str]]:
    """The map from path to name: pattern and name."""
    block = re.search(r"map \$uri \$route \{(.*?)\n    \}", CONFIG.read_text(), re.DOTALL)
    assert block
    lines = [line.strip().rstrip(";").split() for line in block[1].strip().splitlines()]
    return [(pattern, name.strip('"')) for pattern, name in lines]


def name_of(path: str) -> str:
    for pattern, name in routes():
        if pattern == path or (pattern.startswith("~") and re.search(pattern[1:], path)):
            return path if name == "$uri" else name
    return "other"


@pytest.mark.parametrize("path", sorted(PATHS))
def test_every_route_is_logged_by_its_name(path):
    template = path.replace(":path}", "}")
    assert name_of(re.sub(r"\{\w+\}", MARKER, template)) == template


@pytest.mark.parametrize("path", [f"/{MARKER}", f"/margin/{MARKER}", f"/heads/a/{MARKER}", f"/jobs/a/b/{MARKER}"])
def test_what_is_none_of_our_routes_has_no_name(path):
    assert name_of(path) == "other"


def test_nothing_else_that_a_caller_writes_is_in_the_format():
    form = re.search(r"log_format inward (.*?);", CONFIG.read_text(), re.DOTALL)
    assert form
    variables = set(re.findall(r"\$(\w+)", form[1]))
    assert variables == {
        "time_iso8601", "method", "route", "status", "request_time", "upstream_response_time", "upstream_addr",
        "request_length", "sent_http_x_request_id",
    }  # fmt: skip


@pytest.mark.skipif(shutil.which("nginx") is None, reason="no nginx: apt-get install nginx-light")
def test_a_real_nginx_logs_routes_and_no_texts(tmp_path):
    port = free_port()
    folders = "".join(
        f"{kind}_temp_path {tmp_path}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    text = CONFIG.read_text().replace("listen 127.0.0.1:8080", f"listen 127.0.0.1:{port}")
    for replica in (8081, 8082):  # where nobody is
        text = text.replace(f"127.0.0.1:{replica}", f"127.0.0.1:{free_port()}")
    (tmp_path / "nginx.conf").write_text(f"pid {tmp_path}/pid;\n" + text.replace("http {", "http {" + folders, 1))
    command = ["nginx", "-e", "stderr", "-c", tmp_path / "nginx.conf", "-g", "daemon off;"]
    with (tmp_path / "log").open("w") as log:
        nginx = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE) as client:
                wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip())
                for path in (f"/heads/{MARKER}", f"/{MARKER}?text={MARKER}", f"/margin?text={MARKER}"):
                    answer = client.post(path, content=MARKER, headers={"authorization": f"Bearer {MARKER}"})
                    assert answer.status_code == 502
        finally:
            nginx.terminate()
            nginx.wait(PATIENCE)
    written = (tmp_path / "log").read_text()
    assert MARKER not in written
    told = [json.loads(line) for line in written.splitlines() if line.startswith("{")]
    assert [(line["method"], line["route"], line["code"]) for line in told] == [
        ("POST", "/heads/{name}", "502"), ("POST", "other", "502"), ("POST", "/margin", "502"),
    ]  # fmt: skip
