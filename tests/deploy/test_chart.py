"""The Helm chart, rendered by Helm's own library and held against the schemas of Kubernetes: ``make test-deploy``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

NEEDED = "make test-deploy installs it"
helm = pytest.importorskip("helm_python", reason=NEEDED)
kubernetes = pytest.importorskip("kubernetes_validate", reason=NEEDED)

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy/k8s"
VERSIONS = ("1.25", "1.31", "1.34")
KEYS = {"auth": {"apiKeys": ["a-long-enough-key"]}}
EVERYTHING = KEYS | {
    "model": {
        "id": "Qwen/Qwen2.5-7B-Instruct",
        "revision": "main",
        "settings": {"TEMPLATE": "{prompt} {response}", "MAX_ITEMS": 16},
    },
    "image": {"pullSecrets": ["registry"]},
    "worker": {"gpus": 2, "settings": {"BACKBONE": "vllm"}, "nodeSelector": {"pool": "gpu"}},
    "storage": {"models": "models", "heads": "heads", "adapters": "adapters"},
    "autoscaling": {"enabled": True},
    "networkPolicy": {
        "callers": [{"namespaceSelector": {}}],
        "scrapers": [{"podSelector": {"matchLabels": {"app": "prometheus"}}}],
    },
    "monitoring": {"serviceMonitor": True, "rules": True, "dashboards": True, "labels": {"release": "prometheus"}},
}
OUTSIDE = {
    "auth": {"existingSecret": "keys"},
    "redis": {"bundled": False, "existingSecret": "redis"},
    "networkPolicy": {"hub": False},
}
OPEN = {
    "auth": {"insecure": True},
    "networkPolicy": {"enabled": False},
    "redis": {"bundled": False, "url": "rediss://:p@host:6380/0"},
}
CASES = {"default": KEYS, "everything": EVERYTHING, "outside": OUTSIDE, "open": OPEN}


def render(values: dict, name: str = "demo") -> dict[str, dict]:
    """Kind/name → object, as ``helm template`` would give them."""
    with helm.Chart.load(CHART) as chart:
        files = chart.render(values, name=name, namespace="here")
    found = [
        made for path, text in files.items() if path.endswith(".yaml") for made in yaml.safe_load_all(text) if made
    ]
    objects = {f"{made['kind']}/{made['metadata']['name']}": made for made in found}
    assert len(objects) == len(found)
    return objects


def env(objects: dict[str, dict], deployment: str) -> dict[str, object]:
    (container,) = objects[f"Deployment/{deployment}"]["spec"]["template"]["spec"]["containers"]
    names = [variable["name"] for variable in container["env"]]
    assert len(names) == len(set(names)), "a variable is set twice"
    return {variable["name"]: variable.get("value") or variable.get("valueFrom") for variable in container["env"]}


@pytest.mark.parametrize("case", CASES)
def test_helm_finds_nothing_to_complain_about(case):
    found = helm.lint(CHART, values=CASES[case], strict=True)["messages"]
    assert [message["error"] for message in found if message["severity"] > 1] == []


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_every_object(case, version):
    objects = render(CASES[case])
    ours = [
        made
        for made in objects.values()
        if made["apiVersion"].partition("/")[0] in {"v1", "apps", "policy", "networking.k8s.io"}
    ]
    assert len(ours) >= 5
    for made in ours:
        kubernetes.validate(made, version, strict=True)


@pytest.mark.parametrize("case", CASES)
def test_no_pod_is_root_or_writes_to_its_image(case):
    for made in render(CASES[case]).values():
        if made["kind"] in {"Deployment", "StatefulSet"}:
            pod = made["spec"]["template"]["spec"]
            assert pod["securityContext"]["runAsNonRoot"] and pod["automountServiceAccountToken"] is False
            for container in pod["containers"]:
                security = container["securityContext"]
                assert security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"]
                assert security["capabilities"] == {"drop": ["ALL"]}
                mounted = {volume["name"] for volume in container["volumeMounts"]}
                claimed = {claim["metadata"]["name"] for claim in made["spec"].get("volumeClaimTemplates", [])}
                assert mounted == {volume["name"] for volume in pod["volumes"]} | claimed


def test_selectors_find_their_pods_and_nothing_else():
    objects = render(EVERYTHING)
    pods = {
        name: made["spec"]["template"]["metadata"]["labels"]
        for name, made in objects.items()
        if made["kind"] in {"Deployment", "StatefulSet"}
    }
    selectors = [
        made["spec"]["selector"]
        for made in objects.values()
        if made["kind"] in {"Service", "PodDisruptionBudget", "Deployment"}
    ]
    selectors += [made["spec"]["podSelector"] for made in objects.values() if made["kind"] == "NetworkPolicy"]
    assert len(selectors) == 10
    for selector in selectors:
        wanted = selector.get("matchLabels", selector)
        assert sum(wanted.items() <= labels.items() for labels in pods.values()) == 1


@pytest.mark.parametrize("deployment", ["demo-inward-api", "demo-inward-worker"])
def test_a_pod_has_longer_to_stop_than_its_process_takes(deployment):
    pod = render(EVERYTHING)[f"Deployment/{deployment}"]["spec"]["template"]["spec"]
    drain = int(env(render(EVERYTHING), deployment)["INWARD_DRAIN_TIMEOUT"])
    assert pod["terminationGracePeriodSeconds"] >= drain + 10
    probes = pod["containers"][0]
    assert probes["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert probes["livenessProbe"]["httpGet"]["path"] == probes["startupProbe"]["httpGet"]["path"] == "/livez"


def test_settings_reach_those_they_are_for():
    objects = render(EVERYTHING)
    api, worker = env(objects, "demo-inward-api"), env(objects, "demo-inward-worker")
    assert api["INWARD_MODEL"] == worker["INWARD_MODEL"] == "Qwen/Qwen2.5-7B-Instruct"
    assert api["INWARD_TEMPLATE"] == worker["INWARD_TEMPLATE"] == "{prompt} {response}"
    assert (
        api["INWARD_REDIS_URL"]
        == worker["INWARD_REDIS_URL"]
        == {"secretKeyRef": {"name": "demo-inward-redis", "key": "redis-url"}}
    )
    assert (worker["INWARD_BACKBONE"], worker["INWARD_HEADS"], worker["INWARD_ADAPTERS"]) == (
        "vllm",
        "/heads",
        "/adapters",
    )
    assert "INWARD_BACKBONE" not in api and "INWARD_INSECURE" not in api
    assert api["INWARD_API_KEYS_FILE"] == "/etc/inward/keys/api-keys"
    assert objects["Secret/demo-inward-keys"]["stringData"] == {"api-keys": "a-long-enough-key"}


def test_gpus_choose_the_image():
    def image(values):
        return render(values)["Deployment/demo-inward-worker"]["spec"]["template"]["spec"]["containers"][0]

    assert image(KEYS)["image"] == "inward:cpu"
    assert image(EVERYTHING)["image"] == "inward:gpu"
    assert image(EVERYTHING)["resources"]["limits"]["nvidia.com/gpu"] == 2


def test_autoscaling_owns_the_number_of_workers():
    objects = render(EVERYTHING)
    assert "replicas" not in objects["Deployment/demo-inward-worker"]["spec"]
    assert render(KEYS)["Deployment/demo-inward-worker"]["spec"]["replicas"] == 1
    (trigger,) = objects["ScaledObject/demo-inward-worker"]["spec"]["triggers"]
    assert trigger["metadata"]["query"] == 'max(inward_queue_tokens{job="demo-inward-api", namespace="here"})'
    assert objects["ScaledObject/demo-inward-worker"]["spec"]["scaleTargetRef"] == {"name": "demo-inward-worker"}


def test_dashboards_and_rules_are_those_of_the_repository():
    objects = render(EVERYTHING)
    dashboards = objects["ConfigMap/demo-inward-dashboards"]["data"]
    for path in (ROOT / "deploy/grafana/dashboards").glob("*.json"):
        assert json.loads(dashboards[f"inward-{path.name}"]) == json.loads(path.read_text())
    groups = [
        group
        for path in sorted((ROOT / "deploy/prometheus/rules").glob("*.yml"))
        for group in yaml.safe_load(path.read_text())["groups"]
    ]
    assert [group["rules"] for group in objects["PrometheusRule/demo-inward"]["spec"]["groups"]] == [
        group["rules"] for group in groups
    ]
    assert objects["ConfigMap/demo-inward-redis"]["data"]["redis.conf"] == (ROOT / "deploy/redis.conf").read_text()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "auth.apiKeys"),
        (KEYS | {"redis": {"bundled": False}}, "redis.url"),
        (KEYS | {"worker": {"gpu": 1}}, "gpu"),
        (KEYS | {"api": {"replicas": 0}}, "replicas"),
        ({"auth": {"apiKeys": ["short"]}}, "apiKeys"),
        (KEYS | {"redis": {"url": "http://host"}}, "url"),
        (KEYS | {"model": {"settings": {"inward_model": "x"}}}, "inward_model"),
    ],
)
def test_values_that_would_not_work_are_refused(values, said):
    with pytest.raises(helm.HelmError, match=said):
        render(values)
        with helm.Chart.load(CHART) as chart:
            chart.validate_schema(values)


def test_every_value_is_described_by_the_schema():
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert values.keys() == schema["properties"].keys() - {"global"}
    for section, inner in values.items():
        assert inner.keys() == schema["properties"][section]["properties"].keys(), section
