"""Inward's routes in a real server of vLLM's, compiled as vLLM comes: the numbers are those of ``inward serve``, vLLM's
own answers those of vLLM alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from inward.errors import SetupError
from inward.processes import vllm_plugin
from inward.processes.wiring import MODELS, TOY
from support import serving
from support.redis_server import free_port
from support.waiting import PATIENCE

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm does it", exc_type=ImportError)

from inward.backbones.vllm import hosted
from inward.backbones.vllm.internals import EngineArgs, UsageContext
from inward.backbones.vllm.protocol import READING, WORKER

ROOT = Path(__file__).parents[2]
START = 4 * PATIENCE
"""Seconds that vLLM may take to import, compile and begin."""
KEY = "a-key-of-vllms-own"
TEXT = "Cut toward yourself and hold the blade loosely."
PAIR = {"prompt": "How do I sharpen a knife?", "chosen": "Use a whetstone, at a steady angle.", "rejected": TEXT}
ITEM = {"prompt": PAIR["prompt"], "response": TEXT}
REQUESTS: dict[str, Any] = {
    "/margin": {"pairs": [PAIR, {**PAIR, "chosen": TEXT}]},
    "/score": {"items": [ITEM, {**ITEM, "response": "Use a whetstone. " * 20}], "detail": ["layers", "tokens"]},
    "/reward": {"pairs": [PAIR]},
}
DRAWN = {"model": "toy", "prompt": "A knife", "max_tokens": 12, "temperature": 1.0, "seed": 3, "n": 2}
GREEDY = {**DRAWN, "temperature": 0.0, "n": 1}


def installed(folder: Path) -> Path:
    """A folder for PYTHONPATH, where the entry points of ``pyproject.toml`` are found also by an environment into which
    an older checkout is installed.
    """
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    if not metadata.entry_points(group="vllm.endpoint_plugins", name=vllm_plugin.NAME):
        info = folder / "inward_entry_points-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: inward-entry-points\nVersion: 0\n")
        lines = (f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in named.items()) for group, named in points.items())
        (info / "entry_points.txt").write_text("\n".join(lines))
    return folder


def begin(folder: Path, port: int, *options: str, **env: str) -> subprocess.Popen[str]:
    """vLLM's server of the toy model; its log is ``folder/log``."""
    # `vllm serve` itself does not start in vLLM's CPU build, which looks for a distribution of another name
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(TOY / "backbone")]
    options = ("--served-model-name", "toy", "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port), *options)
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_PLUGINS"}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(installed(folder)), *sys.path]),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "XDG_STATE_HOME": str(folder / "state"),
        **serving.PATIENT,
        **env,
    }
    with (folder / "log").open("w") as log:
        return subprocess.Popen([*command, *options], stdout=log, stderr=log, text=True, env=environment, cwd=folder)


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def vllm_server(folder: Path, *options: str, **env: str) -> Iterator[httpx.Client]:
    port = free_port()
    process = begin(folder, port, *options, **env)
    log = folder / "log"
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE) as client:
            end = time.monotonic() + START
            while not answers(client):
                assert process.poll() is None and time.monotonic() < end, log.read_text()[-4000:]
                time.sleep(0.2)
            yield client
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What vLLM answers where nobody asked for the plugin."""
    with vllm_server(tmp_path_factory.mktemp("alone"), INWARD_HEADS="/nowhere") as client:
        return answers_of_vllm(client) | {path: client.post(path, json={}).status_code for path in REQUESTS}


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ``inward serve`` answers."""
    options = ("--model", "toy", "--backbone", "transformers", "--dtype", "float32")
    env = {"XDG_STATE_HOME": str(tmp_path_factory.mktemp("state"))}
    with (
        serving.started(*options, env=env) as served,
        httpx.Client(base_url=served.url, timeout=PATIENCE) as client,
    ):
        return {path: client.post(path, json=body).json() for path, body in REQUESTS.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plugin")


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[httpx.Client]:
    """vLLM with the plugin, the bundled heads and a key; compiled."""
    with vllm_server(folder, "--api-key", KEY, VLLM_PLUGINS="inward") as client:
        client.headers["authorization"] = f"Bearer {KEY}"
        yield client


def answers_of_vllm(client: httpx.Client) -> dict[str, Any]:
    """Without what differs from call to call."""
    models = client.get("/v1/models").json()["data"]
    health = client.get("/health")
    texts = [client.post("/v1/completions", json=body).json() for body in (DRAWN, GREEDY)]
    return {
        "models": [(model["id"], model["root"], model["max_model_len"]) for model in models],
        "health": (health.status_code, health.content),
        "texts": [[(c["text"], c["finish_reason"]) for c in text["choices"]] for text in texts],
        "usage": [text["usage"] for text in texts],
        "unknown": client.post("/v1/completions", json={**DRAWN, "model": "no such"}).status_code,
        "no route": client.get("/no-such-route").json(),
    }


def near(one: Any, other: Any, path: str = "") -> None:
    """Numbers to 1e-3; everything else exactly, but what a backbone's cache does to usage."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one.keys() - {"usage"}:
            near(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), path
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            near(a, b, f"{path}.{i}")
    elif isinstance(one, float):
        assert one == pytest.approx(other, abs=1e-3, rel=1e-3), path
    else:
        assert one == other, path


@pytest.mark.parametrize("path", REQUESTS)
def test_answers_are_those_of_the_service(client: httpx.Client, ours: dict[str, Any], path: str) -> None:
    answer = client.post(path, json=REQUESTS[path])
    assert answer.status_code == 200, answer.text
    assert float(answer.headers["x-inference-time"]) > 0
    near(answer.json(), ours[path])


def test_vllms_own_answers_are_those_of_vllm_alone(client: httpx.Client, alone: dict[str, Any]) -> None:
    for _ in range(2):  # the second time out of the prefix cache, beside cached tokens of ours
        client.post("/score", json=REQUESTS["/score"])
        assert answers_of_vllm(client) == {key: value for key, value in alone.items() if key not in REQUESTS}


def test_nothing_is_served_where_nobody_asked_for_it(alone: dict[str, Any]) -> None:
    assert [alone[path] for path in REQUESTS] == [404] * 3


def test_errors_have_inwards_shape(client: httpx.Client) -> None:
    long = {**ITEM, "response": "knife " * 4000}
    answers = [
        client.post("/score", json={"items": [long]}),
        client.post("/score", json={"items": [ITEM], "no_such_field": 1}),
        client.post("/margin", json={"pairs": [PAIR], "head": "no such"}),
        client.get("/reward"),
    ]
    assert [answer.status_code for answer in answers] == [413, 422, 404, 405]
    codes = [answer.json()["error"]["code"] for answer in answers]
    assert codes == ["too_large", "invalid_field", "not_found", "method_not_allowed"]
    beside = client.post("/score", json={"items": [ITEM, long]}).json()["scores"]
    assert beside[0]["score"] is not None
    assert beside[1]["error"]["code"] == "too_large"


@pytest.mark.parametrize("path", REQUESTS)
def test_vllms_key_guards_the_routes(client: httpx.Client, path: str) -> None:
    for headers in ({}, {"authorization": "Bearer another"}):
        answer = httpx.post(client.base_url.join(path), json=REQUESTS[path], headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorized")


def test_what_is_served_is_told_and_texts_are_not(client: httpx.Client, folder: Path) -> None:
    client.post("/score", json=REQUESTS["/score"])
    log, exposed = (folder / "log").read_text(), client.get("/metrics").text
    (line,) = [line for line in log.splitlines() if "Inward answers /margin, /score, /reward for toy" in line]
    assert "hybrid (hybrid, version 1)" in line
    assert 'inward_requests_total{code="200",route="/score"}' in exposed
    for said in (log, exposed):
        assert "whetstone" not in said
        assert "blade" not in said


def test_a_server_with_the_wrong_heads_ends_before_it_loads_the_model(tmp_path: Path) -> None:
    process = begin(tmp_path, free_port(), VLLM_PLUGINS="inward", INWARD_HEADS=str(MODELS / "smollm2/heads"))
    try:
        assert process.wait(START) != 0
    finally:
        process.kill()
    log = (tmp_path / "log").read_text()
    assert "was fitted on smollm2" in log
    assert "Starting to load model" not in log


def configuration(**changes: Any) -> SimpleNamespace:
    """As much of a ``VllmConfig`` as is looked at."""
    parts = {"parallel_config": {}, "cache_config": {}, "model_config": {"runner_type": "generate"}}
    parts = {name: SimpleNamespace(**{**fields, **changes.pop(name, {})}) for name, fields in parts.items()}
    return SimpleNamespace(**{"speculative_config": None, "kv_transfer_config": None, **parts, **changes})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"parallel_config": {"pipeline_parallel_size": 2}}, "--pipeline-parallel-size"),
        ({"parallel_config": {"data_parallel_size": 2}}, "--data-parallel-size"),
        ({"parallel_config": {"enable_dbo": True}}, "--enable-dbo"),
        ({"parallel_config": {"_api_process_count": 2}}, "--api-server-count"),
        ({"cache_config": {"kv_offloading_size": 4.0}}, "--kv-offloading-size"),
        ({"model_config": {"runner_type": "pooling"}}, "--runner"),
        ({"speculative_config": object()}, "--speculative-config"),
        ({"kv_transfer_config": object()}, "--kv-transfer-config"),
    ],
)
def test_an_engine_that_cannot_be_read_is_refused(change: dict[str, Any], named: str) -> None:
    hosted.refuse(configuration(parallel_config={"tensor_parallel_size": 2}))
    with pytest.raises(SetupError) as refused:
        hosted.refuse(configuration(**change))
    assert named in refused.value.message


@pytest.mark.parametrize(
    "options",
    [
        {"worker_cls": "their.Worker"},
        {"worker_extension_cls": "their.Extension"},
        {"hf_overrides": {"rope_theta": 1e6}},
    ],
)
def test_an_argument_that_is_ours_is_refused(options: dict[str, Any]) -> None:
    arguments = EngineArgs(**{"model": str(TOY / "backbone"), **options})
    with pytest.raises(SetupError, match=next(iter(options)).replace("_", "-")):
        hosted._adapt(arguments)


def test_arguments_as_they_come_are_adapted() -> None:
    arguments = EngineArgs(model=str(TOY / "backbone"), additional_config={"theirs": 1})
    hosted._adapt(arguments)
    assert arguments.worker_cls == WORKER
    assert arguments.additional_config == {"theirs": 1, **READING}


def test_another_plugins_wrapper_is_not_taken_for_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def configure(*_: Any) -> SimpleNamespace:
        return configuration(model_config={"runner_type": "generate", "model": "a model", "revision": None})

    @wraps(configure)
    def theirs(*args: Any) -> Any:
        return configure(*args)

    monkeypatch.setattr(EngineArgs, hosted.CONFIGURE, theirs)
    checked: list[Any] = []
    hosted.prepare(lambda model, revision: checked.append((model, revision)))
    ours = EngineArgs.create_engine_config
    EngineArgs(model=str(TOY / "backbone")).create_engine_config(UsageContext.OPENAI_API_SERVER)
    assert checked == [("a model", None)]
    hosted.prepare(lambda model, revision: checked.append("twice"))
    assert EngineArgs.create_engine_config is ours

    @wraps(ours)
    def around(*args: Any) -> Any:
        return ours(*args)

    monkeypatch.setattr(EngineArgs, hosted.CONFIGURE, around)
    hosted.prepare(lambda model, revision: checked.append("twice"))
    assert EngineArgs.create_engine_config is around
