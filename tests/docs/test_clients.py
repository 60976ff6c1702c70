"""What ``docs/clients.md``, the pages below it and the client's README print is what the server answers."""

import json
import re
import shlex
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]
PAGES = ["docs/clients.md", *(f"docs/clients/{page.name}" for page in sorted((ROOT / "docs/clients").glob("*.md")))]
CLIENTS = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
EXAMPLES = re.findall(r"```sh\n(curl .*?)```\s+```json\n(.*?)```", CLIENTS, re.DOTALL)
OWN = {"id", "created"}
"""Fields that are different each time."""


def near(said, seen):
    """Numbers within 5 % (the page rounds, and bfloat16 differs between processors), everything else exactly."""
    if isinstance(said, dict):
        return said.keys() == seen.keys() and all(near(said[k], seen[k]) for k in said if k not in OWN)
    if isinstance(said, list):
        return len(said) == len(seen) and all(map(near, said, seen))
    if isinstance(said, float):
        return seen == pytest.approx(said, rel=0.05, abs=0.05)
    return said == seen


@pytest.mark.parametrize(
    ("command", "said"), EXAMPLES, ids=[re.search(r":8080(\S+)", command)[1] for command, _ in EXAMPLES]
)
def test_a_curl_example_answers_as_printed(demo_server, command, said):
    _, _, url, _, header, _, body = shlex.split(command)  # curl -s URL -H HEADER -d BODY
    name, _, value = header.partition(": ")
    answer = httpx.post(
        url.replace("http://127.0.0.1:8080", demo_server.url), content=body, headers={name: value}, timeout=300
    )
    assert near(json.loads(said), answer.json())


def test_there_are_as_many_answers_as_examples():
    assert len(EXAMPLES) == CLIENTS.count("```sh\ncurl")


def blocks(file):
    return re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize(
    "file",
    [
        file
        for file in ("docs/guides/serve.md", "docs/guides/openai.md", "clients/python/README.md", *PAGES)
        if blocks(file)
    ],
)
def test_python_examples_run_as_written(demo_server, file, capsys):
    """All but those that need a data set and a model to train."""
    names: dict[str, object] = {}
    for block in blocks(file):
        code = compile(block.replace("http://127.0.0.1:8080", demo_server.url), file, "exec")
        if "dataset" in block:
            continue
        if "cohere" in block:
            pytest.importorskip("cohere", reason="the cohere SDK is not installed: pip install cohere")
        exec(code, names)
        assert capsys.readouterr().out


def test_every_route_of_the_page_exists_and_every_compatibility_route_is_on_it():
    document = json.loads((ROOT / "clients/openapi.json").read_text(encoding="utf-8"))
    compatible = {
        path for path, item in document["paths"].items() if any(op["tags"] == ["compatibility"] for op in item.values())
    }
    named = set(re.findall(r"`(/[\w/-]+)`|:8080(/[\w/-]+)", CLIENTS))
    named = {one or other for one, other in named}
    assert named <= set(document["paths"])
    assert compatible <= named
