"""Dashboards, alerts and recording rules, against the series that the service really has and against Prometheus' own
tool."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client import generate_latest

from inward import metrics
from inward_trainer import metrics as trainer_metrics

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DASHBOARDS = sorted((DEPLOY / "grafana/dashboards").glob("*.json"))
RULES = sorted((DEPLOY / "prometheus/rules").glob("*.yml"))
OF_PROMETHEUS = {"up"}
TARGET_LABELS = {"job", "instance"}
"""Labels that Prometheus adds to every series."""
VARIABLES = {"$__rate_interval": "5m", "$job": ".*", "$instance": ".*", "$head": ".*", "$run": ".*"}
REGISTRIES = (metrics.REGISTRY, trainer_metrics.REGISTRY)

promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool: apt-get install prometheus")


def panels(dashboard: Path) -> list[dict]:
    return [panel for panel in json.loads(dashboard.read_text())["panels"] if panel["type"] != "row"]


def rules() -> list[dict]:
    return [rule for path in RULES for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]


def alerts() -> list[dict]:
    return [rule for rule in rules() if "alert" in rule]


def expressions() -> dict[str, str]:
    """Every PromQL expression of panels and rules, by where it stands."""
    found = {rule.get("alert") or rule["record"]: rule["expr"] for rule in rules()}
    for path in DASHBOARDS:
        for panel in panels(path):
            for target in panel["targets"]:
                found[f"{path.name}: {panel['title']} {target['refId']}"] = target["expr"]
    return found


def series() -> dict[str, set[str]]:
    """Name → labels of everything in /metrics of the service and of the trainer, and of what the recording rules
    make."""
    found: dict[str, set[str]] = {name: set() for name in OF_PROMETHEUS}
    for registry, family in ((one, family) for one in REGISTRIES for family in one.collect()):
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"]}.get(family.type, [""])
        collector = registry._names_to_collectors.get(family.name)
        labels = set(getattr(collector, "_labelnames", ())) | ({"le"} if family.type == "histogram" else set())
        found |= {family.name + suffix: labels for suffix in suffixes}
    for rule in rules():
        if "record" in rule:
            found[rule["record"]] = {
                label for by in re.findall(r"by \(([^)]*)\)", rule["expr"]) for label in re.split(r",\s*", by)
            }
    return found


@pytest.mark.parametrize("where", expressions())
def test_every_series_and_label_of_an_expression_exists(where):
    expression, known = expressions()[where], series()
    plain = re.sub(r'"[^"]*"', '""', expression)
    names = re.findall(r"\b(?:(?:inward|process|python)[a-z0-9_:]*|up)\b(?=[{\[\s),]|$)", plain)
    assert names
    assert set(names) <= known.keys(), f"not in /metrics: {set(names) - known.keys()}"
    used = {label for selector in re.findall(r"{([^}]*)}", plain) for label in re.findall(r"(\w+)\s*(?:=|!)", selector)}
    used |= {label for by in re.findall(r"(?:by|on|ignoring) \(([^)]*)\)", plain) for label in re.split(r",\s*", by)}
    made = re.findall(r'label_replace\([^"]*"(\w+)"', expression)
    there = TARGET_LABELS.union(made, *(known[name] for name in names))
    assert used <= there, f"no such label: {used - there}"


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_is_what_grafana_takes(path):
    dashboard = json.loads(path.read_text())
    assert dashboard["title"] and dashboard["uid"] and dashboard["schemaVersion"] >= 36 and "id" not in dashboard
    variables = [variable["name"] for variable in dashboard["templating"]["list"]]
    assert variables[:3] == ["datasource", "job", "instance"]
    taken: set[tuple[int, int]] = set()
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24 and not cells & taken, f"{panel['title']} lies on another panel"
        taken |= cells
    for panel in panels(path):
        assert panel["title"] and panel["description"] and panel["targets"]
        assert panel["type"] in {"timeseries", "stat", "heatmap", "table"}
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        for target in panel["targets"]:
            assert set(re.findall(r"\$\{?(\w+)", target["expr"])) <= {*variables, "__rate_interval"}
            assert not re.search(r"\b(?:rate|increase)\([^()]*\[\d+[sm]\]", target["expr"]), "use $__rate_interval"


def test_every_alert_says_what_happened_how_bad_it_is_and_has_an_entry_in_the_runbook():
    entries = re.findall(r"^## (Inward\w+)$", (ROOT / "docs/runbook.md").read_text(), re.M)
    assert sorted(entries) == sorted(alert["alert"] for alert in alerts())
    for alert in alerts():
        assert alert["labels"]["severity"] in {"page", "ticket"}
        assert alert["annotations"]["summary"] and alert["for"]


def test_every_alert_goes_to_somebody():
    config = yaml.safe_load((DEPLOY / "alertmanager/alertmanager.yml").read_text())
    receivers = {one["name"]: one["webhook_configs"] for one in config["receivers"]}
    routed = {match: route["receiver"] for route in config["route"]["routes"] for match in route["matchers"]}
    assert routed == {"severity = page": "pages"} and config["route"]["receiver"] == "tickets"
    assert receivers.keys() == {"pages", "tickets"}
    assert all(one["url_file"] == "/run/secrets/alert_webhook" for hooks in receivers.values() for one in hooks)
    names = {alert["alert"] for alert in alerts()}
    for rule in config["inhibit_rules"]:
        matchers = rule["source_matchers"] + rule["target_matchers"]
        assert {name for matcher in matchers for name in re.findall(r"Inward\w+", matcher)} <= names
    prometheus = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    (where,) = prometheus["alerting"]["alertmanagers"]
    assert where["static_configs"] == [{"targets": ["alertmanager:9093"]}]
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    assert services["alertmanager"]["secrets"] == ["alert_webhook"]


def test_every_alert_has_a_test_in_which_it_fires():
    tests = yaml.safe_load((DEPLOY / "prometheus/tests/alerts.yml").read_text())["tests"]
    fired = {rule["alertname"] for test in tests for rule in test.get("alert_rule_test", []) if rule["exp_alerts"]}
    assert fired == {alert["alert"] for alert in alerts()}


@promtool
def test_prometheus_takes_the_configuration_and_the_rules():
    _promtool("check", "config", DEPLOY / "prometheus/prometheus.yml")


@promtool
def test_the_alerts_fire_when_they_should():
    _promtool("test", "rules", DEPLOY / "prometheus/tests/alerts.yml")


@promtool
def test_prometheus_takes_the_metrics():
    exposed = metrics.exposition() + generate_latest(trainer_metrics.REGISTRY)
    result = subprocess.run(["promtool", "check", "metrics"], input=exposed, capture_output=True)
    problems = [line for line in (result.stdout + result.stderr).decode().splitlines() if "inward_" in line]
    assert not problems


@promtool
def test_prometheus_takes_the_panels_expressions(tmp_path):
    made = []
    for number, expression in enumerate(expressions().values()):
        for variable, value in VARIABLES.items():
            expression = expression.replace(variable, value)
        made.append({"record": f"panel:{number}", "expr": expression})
    (tmp_path / "panels.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": made}]}))
    _promtool("check", "rules", tmp_path / "panels.yml")


def _promtool(*arguments: str | Path) -> None:
    result = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
