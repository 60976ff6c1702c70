"""The dashboards against Grafana's own schema, in the version that the compose file runs: its SDK reads them and
writes them again. ``make test-deploy``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

NEEDED = "make test-deploy installs it"
JSONEncoder = pytest.importorskip("grafana_foundation_sdk.cog.encoder", reason=NEEDED).JSONEncoder
register_default_plugins = pytest.importorskip(
    "grafana_foundation_sdk.cog.plugins", reason=NEEDED
).register_default_plugins
Dashboard = pytest.importorskip("grafana_foundation_sdk.models.dashboard", reason=NEEDED).Dashboard

ROOT = Path(__file__).parents[2]
DASHBOARDS = sorted((ROOT / "deploy/grafana/dashboards").glob("*.json"))


def lost(ours: object, read: object, at: str = "") -> Iterator[str]:
    """Where something that we wrote was not understood: what the schema does not know is not in what it writes."""
    if isinstance(ours, dict) and isinstance(read, dict):
        for name, value in ours.items():
            yield from lost(value, read.get(name), f"{at}.{name}")
    elif isinstance(ours, list) and isinstance(read, list) and len(ours) == len(read):
        for place, (one, other) in enumerate(zip(ours, read, strict=True)):
            yield from lost(one, other, f"{at}[{place}]")
    elif ours != read:
        yield f"{at}: {ours!r} became {read!r}"


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_grafana_knows_every_field_of_a_dashboard(path):
    register_default_plugins()
    dashboard = json.loads(path.read_text())
    assert list(lost(dashboard, json.loads(JSONEncoder().encode(Dashboard.from_json(dashboard))))) == []


def test_a_field_that_grafana_does_not_know_is_found():
    register_default_plugins()
    dashboard = json.loads(DASHBOARDS[0].read_text())
    dashboard["panels"][0]["titel"] = "Workers"
    assert list(lost(dashboard, json.loads(JSONEncoder().encode(Dashboard.from_json(dashboard))))) == [
        ".panels[0].titel: 'Workers' became None"
    ]


def test_the_schema_is_that_of_the_grafana_that_is_run():
    image = re.search(r"image: grafana/grafana:(\d+\.\d+)", (ROOT / "docker-compose.yml").read_text())
    assert image is not None
    assert version("grafana-foundation-sdk").partition("!")[2].startswith(image[1] + ".")
