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
    "worker": {
        "gpus": 2,
        "settings": {"BACKBONE": "vllm"},
        "nodeSelector": {"pool": "gpu"},
        "runtimeClass": "nvidia",
        "priorityClass": "high",
        "affinity": {"nodeAffinity": {}},
        "envFrom": [{"configMapRef": {"name": "vllm"}}],
    },
    "api": {"autoscaling": {"enabled": True}, "extraEnv": [{"name": "API_ONLY", "value": "1"}]},
    "hub": {"token": "hf_secret"},
    "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
    "envFrom": [{"secretRef": {"name": "more"}}],
    "ingress": {"enabled": True, "host": "inward.example.org", "className": "nginx", "tlsSecret": "tls"},
    "httpRoute": {"enabled": True, "host": "inward.example.org", "parentRefs": [{"name": "gateway"}]},
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
SMALL = {
    "name": "small",
    "model": {"id": "Qwen/Qwen2.5-0.5B-Instruct"},
    "worker": {"gpus": 1, "gpuResource": "nvidia.com/mig-1g.10gb"},
    "ingress": {"host": "small.example.org"},
    "httpRoute": {"host": "small.example.org"},
    "autoscaling": {"by": "external-metric", "minReplicas": 0},
}
SEVERAL = EVERYTHING | {"models": [SMALL]}
SHARDED = KEYS | {"redis": {"bundled": False, "urls": ["redis://:p@a:6379/0", "redis://:p@b:6379/0"]}}
CASES = {
    "default": KEYS,
    "sharded": SHARDED,
    "everything": EVERYTHING,
    "several": SEVERAL,
    "outside": OUTSIDE,
    "open": OPEN,
}


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
        if made["apiVersion"].partition("/")[0] in {"v1", "apps", "policy", "autoscaling", "networking.k8s.io"}
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


@pytest.mark.parametrize(("values", "count"), [(EVERYTHING, 10), (SEVERAL, 18)])
def test_selectors_find_their_pods_and_nothing_else(values, count):
    objects = render(values)
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
    assert len(selectors) == count
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


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_the_container_of_the_kserve_runtime(version):
    runtime = next(yaml.safe_load_all((ROOT / "deploy/kserve.yaml").read_text()))
    spec = {name: runtime["spec"][name] for name in ("containers", "volumes")}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": spec}
    kubernetes.validate(pod, version, strict=True)


def test_gpus_choose_the_image():
    def image(values):
        return render(values)["Deployment/demo-inward-worker"]["spec"]["template"]["spec"]["containers"][0]

    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    assert image(KEYS)["image"] == f"inward:{version}-cpu"
    assert image(EVERYTHING)["image"] == f"inward:{version}-gpu"
    assert image(EVERYTHING)["resources"]["limits"]["nvidia.com/gpu"] == 2
    for named in ("nvidia.com/mig-3g.40gb", "amd.com/gpu"):
        limits = image(KEYS | {"worker": {"gpus": 1, "gpuResource": named}})["resources"]["limits"]
        assert limits[named] == 1 and "nvidia.com/gpu" not in limits


def test_a_worker_with_several_gpus_runs_one_model_over_all_of_them():
    def options(worker, **more):
        values = KEYS | {"worker": worker} | more
        return env(render(values), "demo-inward-worker").get("INWARD_VLLM_OPTIONS")

    assert options({"gpus": 4}) == '{"tensor_parallel_size":4}'
    assert options({"gpus": 1}) is options({"gpus": 0}) is None
    assert options({"gpus": 2, "settings": {"VLLM_OPTIONS": "{}"}}) == "{}"
    assert options({"gpus": 2}, model={"settings": {"VLLM_OPTIONS": "{}"}}) == "{}"


def test_shards_are_named_to_api_and_workers():
    objects = render(SHARDED)
    for deployment in ("demo-inward-api", "demo-inward-worker"):
        named = env(objects, deployment)
        assert named["INWARD_REDIS_URLS"] == {"secretKeyRef": {"name": "demo-inward-redis", "key": "redis-urls"}}
        assert "INWARD_REDIS_URL" not in named
    assert objects["Secret/demo-inward-redis"]["stringData"]["redis-urls"] == "redis://:p@a:6379/0,redis://:p@b:6379/0"


def test_autoscaling_owns_the_number_of_workers():
    objects = render(EVERYTHING)
    assert "replicas" not in objects["Deployment/demo-inward-worker"]["spec"]
    assert render(KEYS)["Deployment/demo-inward-worker"]["spec"]["replicas"] == 1
    (trigger,) = objects["ScaledObject/demo-inward-worker"]["spec"]["triggers"]
    assert trigger["metadata"]["query"] == 'max(inward_queue_tokens{job="demo-inward-api", namespace="here"})'
    assert objects["ScaledObject/demo-inward-worker"]["spec"]["scaleTargetRef"] == {"name": "demo-inward-worker"}


def test_there_is_always_a_worker_since_nothing_waits_without_one():
    values = KEYS | {"autoscaling": {"enabled": True, "minReplicas": 0}}
    assert render(values)["ScaledObject/demo-inward-worker"]["spec"]["minReplicaCount"] == 1


def test_what_else_may_be_reached_is_appended_to_the_policies():
    proxy = {"ports": [{"port": 3128}], "to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}
    for values, last in ((KEYS, {"ports": [{"port": 443}]}), (KEYS | {"networkPolicy": {"egress": [proxy]}}, proxy)):
        objects = render(values)
        for role in ("api", "worker"):
            assert objects[f"NetworkPolicy/demo-inward-{role}"]["spec"]["egress"][-1] == last


def test_without_keda_workers_follow_what_prometheus_adapter_gives():
    values = KEYS | {"autoscaling": {"enabled": True, "by": "external-metric", "minReplicas": 0}}
    scaler = render(values)["HorizontalPodAutoscaler/demo-inward-worker"]["spec"]
    assert scaler["minReplicas"] == 1  # Kubernetes takes no zero there
    (metric,) = scaler["metrics"]
    assert metric["external"]["metric"] == {
        "name": "inward_queue_tokens",
        "selector": {"matchLabels": {"job": "demo-inward-api"}},
    }
    assert metric["external"]["target"] == {"type": "AverageValue", "averageValue": "20000"}


def test_autoscaling_owns_the_number_of_replicas():
    objects = render(EVERYTHING)
    assert "replicas" not in objects["Deployment/demo-inward-api"]["spec"]
    assert render(KEYS)["Deployment/demo-inward-api"]["spec"]["replicas"] == 2
    scaler = objects["HorizontalPodAutoscaler/demo-inward-api"]["spec"]
    assert scaler["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "demo-inward-api"}
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (2, 10)


def test_a_gated_model_has_its_token_wherever_the_hub_is_asked():
    objects = render(EVERYTHING)
    assert objects["Secret/demo-inward-hub"]["stringData"] == {"token": "hf_secret"}
    for role in ("api", "worker"):
        token = {"secretKeyRef": {"name": "demo-inward-hub", "key": "token"}}
        assert env(objects, f"demo-inward-{role}")["HF_TOKEN"] == token
    elsewhere = render(KEYS | {"hub": {"existingSecret": "mine"}})
    assert "Secret/demo-inward-hub" not in elsewhere
    assert env(elsewhere, "demo-inward-api")["HF_TOKEN"]["secretKeyRef"]["name"] == "mine"
    assert "HF_TOKEN" not in env(render(KEYS), "demo-inward-api")


def test_more_variables_reach_those_they_are_for():
    objects = render(EVERYTHING)
    (api,), (worker,) = (
        objects[f"Deployment/demo-inward-{role}"]["spec"]["template"]["spec"]["containers"]
        for role in ("api", "worker")
    )
    assert env(objects, "demo-inward-api")["API_ONLY"] == "1"
    assert "API_ONLY" not in env(objects, "demo-inward-worker")
    assert env(objects, "demo-inward-worker")["HTTPS_PROXY"] == "http://proxy:3128"
    assert api["envFrom"] == [{"secretRef": {"name": "more"}}]
    assert worker["envFrom"] == [{"secretRef": {"name": "more"}}, {"configMapRef": {"name": "vllm"}}]


def test_a_pod_runs_where_it_is_told_to_and_sees_no_services_variables():
    objects = render(EVERYTHING)
    worker = objects["Deployment/demo-inward-worker"]["spec"]["template"]["spec"]
    assert (worker["runtimeClassName"], worker["priorityClassName"]) == ("nvidia", "high")
    assert worker["affinity"] == {"nodeAffinity": {}} and worker["nodeSelector"] == {"pool": "gpu"}
    for role in ("api", "worker"):
        assert objects[f"Deployment/demo-inward-{role}"]["spec"]["template"]["spec"]["enableServiceLinks"] is False


def test_callers_come_in_by_an_ingress_or_by_a_gateway():
    objects = render(EVERYTHING)
    (rule,) = objects["Ingress/demo-inward"]["spec"]["rules"]
    assert rule["host"] == "inward.example.org"
    assert rule["http"]["paths"][0]["backend"] == {"service": {"name": "demo-inward-api", "port": {"name": "http"}}}
    assert objects["Ingress/demo-inward"]["spec"]["tls"] == [{"hosts": ["inward.example.org"], "secretName": "tls"}]
    route = objects["HTTPRoute/demo-inward"]["spec"]
    assert (route["hostnames"], route["parentRefs"]) == (["inward.example.org"], [{"name": "gateway"}])
    assert route["rules"][0]["backendRefs"] == [{"name": "demo-inward-api", "port": 80}]


def test_each_model_of_a_release_has_processes_and_a_queue_of_its_own():
    objects = render(SEVERAL)
    first, small = env(objects, "demo-inward-worker"), env(objects, "demo-inward-small-worker")
    assert (first["INWARD_MODEL"], small["INWARD_MODEL"]) == ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct")
    assert small["INWARD_QUEUE"] == env(objects, "demo-inward-small-api")["INWARD_QUEUE"] == "small"
    assert small["INWARD_REDIS_URL"] == first["INWARD_REDIS_URL"] and "INWARD_QUEUE" not in first
    for variable in ("INWARD_REVISION", "INWARD_HEADS", "INWARD_ADAPTERS"):  # they belong to the first model
        assert variable in first and variable not in small
    assert small["INWARD_BACKBONE"] == "vllm"  # as for the first
    limits = objects["Deployment/demo-inward-small-worker"]["spec"]["template"]["spec"]["containers"][0]["resources"]
    assert limits["limits"]["nvidia.com/mig-1g.10gb"] == 1
    assert objects["Ingress/demo-inward-small"]["spec"]["rules"][0]["host"] == "small.example.org"
    assert "HorizontalPodAutoscaler/demo-inward-small-worker" in objects
    watched = objects["ServiceMonitor/demo-inward"]["spec"]["selector"]["matchExpressions"][0]["values"]
    assert watched == ["api", "worker", "api-small", "worker-small"]
    allowed = objects["NetworkPolicy/demo-inward-redis"]["spec"]["ingress"][0]["from"]
    components = [peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"] for peer in allowed]
    assert components == watched


def test_named_keys_become_the_file_that_the_api_reads():
    key = {"name": "trainer", "sha256": "a" * 64, "scope": "admin", "expires": "2027-01-31", "quota": 1000}
    secret = render({"auth": {"keys": [key]}})["Secret/demo-inward-keys"]["stringData"]["api-keys"]
    assert yaml.safe_load(secret) == {"keys": [key]}
    assert secret.startswith("keys:")


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
        (KEYS | {"redis": {"urls": ["redis://a"]}}, "redis.bundled=false"),
        (KEYS | {"redis": {"bundled": False, "url": "redis://a", "urls": ["redis://b"]}}, "named twice"),
        (KEYS | {"worker": {"gpu": 1}}, "gpu"),
        (KEYS | {"api": {"replicas": 0}}, "replicas"),
        ({"auth": {"apiKeys": ["short"]}}, "apiKeys"),
        (KEYS | {"redis": {"url": "http://host"}}, "url"),
        (KEYS | {"model": {"settings": {"inward_model": "x"}}}, "inward_model"),
        (
            KEYS | {"auth": {"apiKeys": ["a-plain-key"], "keys": [{"name": "a", "sha256": "a" * 64}]}},
            "auth.keys or auth.a",
        ),
        ({"auth": {"keys": [{"name": "a", "sha256": "not a digest"}]}}, "sha256"),
        (KEYS | {"ingress": {"enabled": True}}, "ingress.host names"),
        (SEVERAL | {"models": [SMALL | {"ingress": {}}]}, "a host of its own: set ingress.host"),
        (KEYS | {"models": [{"name": "Large", "model": {"id": "m"}}]}, "name"),
        (KEYS | {"worker": {"gpuResource": "gpu"}}, "gpuResource"),
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
        if isinstance(inner, dict):
            assert inner.keys() == schema["properties"][section]["properties"].keys(), section
        else:
            assert schema["properties"][section]["type"] == "array"
