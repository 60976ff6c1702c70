"""The README's example is what the server answers."""

import json
import re
import shlex
from pathlib import Path

import httpx
import pytest

from support.real_model import smollm2
from support.serving import started
from support.waiting import PATIENCE

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def near(said, seen):
    """Numbers within 5 % (the README rounds, and processors differ), everything else exactly."""
    if isinstance(said, dict):
        return said.keys() == seen.keys() and all(near(said[k], seen[k]) for k in said)
    if isinstance(said, list):
        return len(said) == len(seen) and all(map(near, said, seen))
    if isinstance(said, float):
        return seen == pytest.approx(said, rel=0.05, abs=0.05)
    return said == seen


def test_the_first_example_answers_as_printed(tmp_path):
    command = re.search(r"```sh\n(curl .*?)```", README, re.DOTALL)[1]
    said = json.loads(re.search(r"```json\n(.*?)```", README, re.DOTALL)[1])
    _, _, url, _, header, _, body = shlex.split(command)  # curl -s URL -H HEADER -d BODY
    name, _, value = header.partition(": ")
    smollm2()  # or the reason why this can't be seen here
    with started("--dtype", "float32", env={"XDG_STATE_HOME": str(tmp_path)}) as served:
        answer = httpx.post(
            url.replace("http://127.0.0.1:8080", served.url), content=body, headers={name: value}, timeout=PATIENCE
        )
    assert near(said, answer.json())


def test_it_is_read_in_three_minutes():
    assert len(README.split()) <= 700


def test_what_it_links_to_is_there():
    links = re.findall(r"\]\((?!https:)([^)#]+)", README)
    assert len(links) > 5
    assert all((ROOT / link).exists() for link in links)
