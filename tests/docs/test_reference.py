"""The reference pages say what the code says, and leave nothing out."""

import json
import re
from pathlib import Path

import pytest

from contract import reference
from inward import errors, metrics
from inward.commands import COMMANDS
from inward.settings import Settings

ROOT = Path(__file__).parents[2]


def page(name):
    return (ROOT / "docs/reference" / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", reference.PAGES)
def test_a_page_is_what_the_code_says(name):
    assert page(name) == reference.PAGES[name](), "run `make contract`"


def test_every_setting_is_there():
    assert set(re.findall(r"`INWARD_(\w+)`", page("settings.md"))) == {name.upper() for name in Settings.model_fields}


def test_every_route_and_every_field_is_there():
    document = json.loads((ROOT / "clients/openapi.json").read_text(encoding="utf-8"))
    said = page("routes.md")
    for path, item in document["paths"].items():
        assert all(f"### `{method.upper()} {path}`" in said for method in item)
    for name, schema in document["components"]["schemas"].items():
        part = said.partition(f"### {name}\n")[2].partition("\n### ")[0]
        assert all(f"`{field}`" in part for field in schema.get("properties", ())), name


def test_every_link_between_routes_and_objects_leads_somewhere():
    said = page("routes.md")
    headings = {line.removeprefix("### ").lower() for line in said.splitlines() if line.startswith("### ")}
    assert set(re.findall(r"\]\(#(\w+)\)", said)) <= headings


def test_every_command_is_there():
    assert all(f"## `inward {name}`" in page("cli.md") for name in COMMANDS)


def test_every_series_is_there():
    families = [f for f in metrics.REGISTRY.collect() if f.name.startswith("inward_")]
    said = page("metrics.md")
    assert all(f"`{f.name}{'_total' * (f.type == 'counter')}`" in said for f in families)


def test_every_error_is_there():
    assert all(f"`{error.code}`" in page("errors.md") for error in errors.tree()[1:])
