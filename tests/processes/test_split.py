"""``inward api`` and ``inward worker`` as separate processes around a Redis, where nothing goes wrong."""

import json
import subprocess
import sys

import httpx
import pytest

from api.test_stream import events
from support.adapters import write_adapter
from support.fleet import Fleet
from support.serving import write_model
from support.waiting import PATIENCE, wait_until


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("split")
    write_model(folder)
    return folder


@pytest.fixture
def fleet(folder, redis_server):
    with Fleet(folder, redis_server.url) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def http():
    with httpx.Client(timeout=PATIENCE) as client:
        yield client


def pairs(n):
    return [
        {"prompt": f"question {i}", "chosen": f"a good answer {i}", "rejected": f"another {i * i}"} for i in range(n)
    ]


def test_an_api_replica_is_red_until_there_is_a_worker_and_then_answers_as_one_process_does(fleet, http):
    api = fleet.api()
    worker = None
    try:
        fleet.wait_until_serving(api)
        wait_until(
            lambda: http.get(api.url + "/readyz").json()["error"]["message"] == "no worker takes jobs from the queue"
        )  # Redis was asked
        assert http.get(api.url + "/readyz").status_code == 503
        assert http.get(api.url + "/livez").status_code == 200
        assert http.post(api.url + "/margin", json={"pairs": pairs(1)}).status_code == 503
        worker = fleet.worker()
        fleet.wait_until_ready(worker, api)
        answer = http.post(api.url + "/margin", json={"pairs": pairs(30)}).json()
        alone = [http.post(api.url + "/margin", json={"pairs": [pair]}).json()["margins"][0] for pair in pairs(30)]
        assert [m["margin"] for m in answer["margins"]] == pytest.approx([m["margin"] for m in alone], rel=1e-5)
        info = http.get(api.url + "/info").json()
        assert (info["heads"], info["limits"]["tokens"]) == (["bench-0"], 1024)
        assert http.get(api.url + "/heads").json() == {"heads": [http.get(api.url + "/heads/bench-0").json()]}
        assert http.get(api.url + "/heads/nope").status_code == 404
        for most, status in ((1000, 200), (1024, 413), (20480, 413)):  # the limit that the worker has said by now
            ask = {"prompt": "question", "n": 1, "sampling": {"max_tokens": most}}
            assert http.post(api.url + "/rerank", json=ask).status_code == status
        assert "inward_workers 1.0" in http.get(api.url + "/metrics").text
        assert "inward_computed_tokens_total" in http.get(worker.url + "/metrics").text
    finally:
        assert api.stop() == 0
        assert worker is None or worker.stop() == 0


def test_drawn_answers_come_through_redis_one_by_one_and_a_seed_repeats_them(fleet, http):
    api, workers = fleet.api(), [fleet.worker(), fleet.worker()]
    fleet.wait_until_ready(*workers, api)
    ask = {"prompt": "question", "n": 6, "sampling": {"max_tokens": 8, "seed": 3}, "stream": True}
    *samples, (last, first) = events(http.post(api.url + "/rerank", json=ask).text)
    assert [name for name, _ in samples] == ["sample"] * 6
    assert last == "result"
    assert sorted(sample["index"] for _, sample in samples) == list(range(6))
    assert {sample["text"]: sample["score"] for _, sample in samples} == {
        ranked["text"]: ranked["score"] for ranked in first["results"]
    }
    second = events(http.post(api.url + "/rerank", json=ask).text)[-1][1]
    assert [ranked["text"] for ranked in second["results"]] == [ranked["text"] for ranked in first["results"]]


def test_an_answer_comes_through_redis_while_it_is_drawn(redis_server, folder, http):
    with Fleet(folder, redis_server.url, demo=True) as fleet:
        api, worker = fleet.api(), fleet.worker()
        fleet.wait_until_ready(worker, api)
        ask = {"model": "toy", "prompt": "Once upon", "max_tokens": 500, "seed": 3}
        whole = http.post(api.url + "/v1/completions", json=ask).json()["choices"][0]
        texts = []
        with http.stream("POST", api.url + "/v1/completions", json={**ask, "stream": True}) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    choice = json.loads(line.removeprefix("data: "))["choices"][0]
                    texts.append(choice["text"])
        assert len(texts) > 2  # the last one is the end without text
        assert "".join(texts) == whole["text"]
        assert choice["finish_reason"] == whole["finish_reason"]


def test_a_head_that_is_switched_is_switched_in_every_worker_when_the_answer_comes(fleet, http, folder):
    root = folder / "heads" / "bench-0"
    second = root / "2"
    second.mkdir(exist_ok=True)
    manifest = json.loads((root / "head.json").read_text()) | {"version": 2}
    (second / "head.json").write_text(json.dumps(manifest))
    (second / "head.safetensors").write_bytes((root / "head.safetensors").read_bytes())
    workers, api = [fleet.worker(), fleet.worker()], fleet.api()
    fleet.wait_until_ready(*workers, api)
    for version in (1, 2, 1):
        answer = http.post(api.url + "/heads/bench-0/activate", json={"version": version})
        assert answer.json() == {"name": "bench-0", "kind": "legend", "version": version}
        for worker in workers:
            assert http.get(worker.url + "/readyz").status_code == 200
        seen = {
            http.post(api.url + "/score", json={"items": [{"prompt": "a", "response": "b"}]}).json()["head"]["version"]
            for _ in range(20)
        }
        assert seen == {version}
    missing = http.post(api.url + "/heads/bench-0/activate", json={"version": 9})
    assert missing.status_code == 404
    assert "no version 9" in missing.json()["error"]["message"]


def test_a_policy_that_is_switched_to_outlives_the_workers(fleet, http, tmp_path):
    write_adapter(tmp_path / "v1")
    adapters = ("--adapters", str(tmp_path))
    worker, api = fleet.worker(*adapters), fleet.api()
    fleet.wait_until_ready(worker, api)
    item = {"items": [{"prompt": "a", "response": "b"}]}
    base = http.post(api.url + "/score", json=item).json()
    answer = http.post(api.url + "/policy", json={"version": "v1"}).json()
    assert (answer["policy_version"], answer["previous"], answer["available"]) == ("v1", "base", ["base", "v1"])
    carried = [http.post(api.url + "/score", json=item).json() for _ in range(5)]
    assert {score["policy_version"] for score in carried} == {"v1"}
    assert carried[0]["scores"][0]["score"] != base["scores"][0]["score"]
    worker.kill()
    successor = fleet.worker(*adapters)
    fleet.wait_until_ready(successor, api)
    assert http.get(successor.url + "/info").json()["policy_version"] == "v1"
    assert 'inward_policy_info{version="v1"} 1.0' in http.get(successor.url + "/metrics").text
    assert http.get(api.url + "/policy").json()["history"] == answer["history"]


def test_an_api_replica_needs_no_torch(folder, redis_server):
    script = f"""
import asyncio, sys
import inward.commands.api
from inward.processes.api import ApiProcess
from inward.settings import Settings
async def main():
    front = await ApiProcess.open(Settings(model={str(folder / "model")!r}, redis_url={redis_server.url!r}))
    await front.close(1)
asyncio.run(main())
print(sorted(set(sys.modules) & {{"torch", "vllm"}}))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path)},
        check=False,
    )
    assert done.stdout.strip() == "[]", done.stderr
