"""What callers write stays between them and the model: a marker in their texts, and what was searched for it."""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import pytest

from support.collector import Collector, collector
from support.fleet import Fleet
from support.serving import serve, write_model
from support.waiting import PATIENCE, wait_until

MARKER = "Qzxmarkerqzx"
KEY = "a-key-Kjwmarkerkjw"
TEXT = f"harbour {MARKER} quiet"
PAIR = {"prompt": TEXT, "chosen": f"{TEXT} lock", "rejected": f"{TEXT} boats"}
ITEM = {"prompt": TEXT, "response": f"{TEXT} lock"}
CHAT = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": f"{TEXT} lock"}]
LONG = f"{TEXT} " * 3000
GOOD = {
    "/margin": [{"pairs": [PAIR]}],
    "/score": [{"items": [ITEM, {"messages": CHAT}]}, {"items": [ITEM], "detail": ["layers", "tokens"]}],
    "/rerank": [
        {"prompt": TEXT, "candidates": [TEXT, f"{TEXT} lock"]},
        {"prompt": TEXT, "n": 2, "sampling": {"max_tokens": 3, "seed": 1}},
    ],
    "/v1/chat/completions": [
        {"messages": CHAT[:1], "max_tokens": 3, "best_of": 2},
        {"messages": CHAT[:1], "max_tokens": 3, "stream": True},
    ],
    "/v1/completions": [{"prompt": TEXT, "max_tokens": 3}],
    "/v1/decisions": [
        {
            "input": CHAT,
            "questions": [
                {"type": "predicate", "name": MARKER, "instructions": TEXT},
                {"type": "choice", "instructions": TEXT, "choices": [{"value": TEXT}, {"value": MARKER}]},
            ],
        }
    ],
}
BAD = [
    {"pairs": MARKER}, {"items": [MARKER]}, {"items": [ITEM | {"prompt": 3}, {"prompt": [MARKER]}]},
    {"messages": MARKER},
    {"pairs": [PAIR | {"chosen": LONG}]}, {"items": [ITEM | {"response": LONG}]},
    {"prompt": LONG, "candidates": [TEXT, TEXT]},
    {"items": [{"messages": [{"role": MARKER, "content": TEXT}]}]}, {"items": [{"messages": CHAT[1:]}]},
    {"items": [ITEM], "detail": [MARKER]}, {"prompt": TEXT, "n": MARKER},
    {"prompt": TEXT, "candidates": {MARKER: TEXT}}, {"query": [MARKER]}, {"query": TEXT, "documents": LONG},
    {"sequence": 1, "pairs": [PAIR]}, {"version": MARKER * 50}, [MARKER], MARKER, None,
]  # fmt: skip


@dataclass
class Running:
    """What listens to callers, and what all of its processes said so far."""

    url: str
    log: Callable[[], str]
    metrics: list[str]
    """Where they are."""
    collector: Collector


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("private")
    write_model(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")  # milliseconds until spans are sent
        yield folder


@contextmanager
def one_process(folder, _):
    with (
        collector() as traces,
        serve(folder, env={"INWARD_API_KEYS": KEY, "INWARD_OTLP_ENDPOINT": traces.url}) as served,
    ):
        yield Running(served.url, lambda: "".join(served.log), [served.url], traces)


@contextmanager
def two_processes(folder, redis_server):
    with redis_server.client() as client:
        client.flushall()
    with collector() as traces, Fleet(folder, redis_server.url, api_keys=KEY, otlp_endpoint=traces.url) as fleet:
        processes = api, worker = fleet.api(), fleet.worker()
        fleet.wait_until_ready(worker, api)

        def logged():
            return "".join(line for process in processes for line in list(process.log))

        yield Running(api.url, logged, [api.url, worker.url], traces)


@pytest.fixture(scope="module", params=[one_process, two_processes])
def server(request, folder):
    redis_server = request.getfixturevalue("_shared_redis") if request.param is two_processes else None
    with request.param(folder, redis_server) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {KEY}"}, timeout=PATIENCE) as client:
        yield client


def traced(server, client):
    """The spans of a request that is sent now, once they are collected; all that ended before them in these
    processes are, too."""
    trace = uuid.uuid4().hex
    answer = client.post("/margin", json={"pairs": [PAIR]}, headers={"traceparent": f"00-{trace}-00f067aa0ba902b7-01"})
    assert answer.status_code == 200
    return wait_until(
        lambda: len(spans := [span for span in server.collector.spans if span.trace == trace]) > 3 and spans
    )


def said(server, client):
    """All that the processes logged, counted and recorded."""
    traced(server, client)
    metrics = [httpx.get(f"{url}/metrics", timeout=PATIENCE).text for url in server.metrics]
    return server.log() + "".join(metrics) + b"".join(server.collector.bodies).decode(errors="replace")


def work_off(client):
    """A bulk job; where there are none, that is said."""
    rows = "\n".join(json.dumps(row) for row in (PAIR, {"prompt": TEXT}, MARKER, PAIR | {"chosen": LONG}))
    answer = client.post(
        "/jobs", params={"kind": "margin"}, content=rows, headers={"content-type": "application/x-ndjson"}
    )
    if answer.status_code == 201:
        wait_until(lambda: client.get(f"/jobs/{answer.json()['id']}").json()["state"] == "done")
    return answer


def test_text_reaches_no_log_no_metric_no_trace_and_no_error(server, client):
    document = client.get("/openapi.json").json()
    routes = [
        path.replace("{name}", "any").replace("{id}", "0" * 32)
        for path, verbs in document["paths"].items()
        if "post" in verbs
    ]
    assert len(routes) > 8
    answers = [client.post(route, json=body) for route, bodies in GOOD.items() for body in bodies]
    assert [answer.status_code for answer in answers] == [200] * len(answers)
    refused = []
    for route in routes:
        tries = [client.post(route, json=body) for body in BAD]
        tries.append(
            client.post(route, content=f'{{"{MARKER}": {MARKER}', headers={"content-type": "application/json"})
        )
        tries.append(client.post(route, content=TEXT))
        tries.append(client.post(route, json={"items": [ITEM]}, headers={"authorization": f"Bearer {MARKER}"}))
        tries.append(
            client.post(route, json={"items": [ITEM]}, params={"q": MARKER}, headers={"x-request-id": f"<{MARKER}>"})
        )
        refused += [(route, answer) for answer in tries if answer.status_code >= 400]
    refused += [
        ("other", client.get(f"/{MARKER}", params={"prompt": MARKER})),
        ("other", client.request(MARKER.upper(), "/margin")),
    ]
    refused += [("/jobs", answer) for answer in [work_off(client)] if answer.status_code != 201]
    assert len(refused) > 10 * len(routes) and {answer.status_code for _, answer in refused} >= {
        400,
        401,
        404,
        413,
        422,
    }
    told = [
        (route, answer.status_code, answer.text[:200])
        for route, answer in refused
        if MARKER.lower() in answer.text.lower()
    ]
    assert told == []
    everything = said(server, client) + json.dumps(client.get("/info").json())
    assert '"request"' in everything and "inward_requests_total" in everything and "inward.batch.tokens" in everything
    assert MARKER.lower() not in everything.lower()


def test_a_key_is_seen_nowhere(server, client):
    everything = said(server, client) + client.get("/info").text + client.get("/openapi.json").text
    assert KEY not in everything and base64.b64encode(KEY.encode()).decode() not in everything


def test_without_a_key_nothing_but_health_and_metrics_answers(client):
    document = client.get("/openapi.json").json()
    for path, verbs in document["paths"].items():
        for verb in verbs:
            answer = httpx.request(
                verb, f"{client.base_url}{path}".replace("{name}", "any").replace("{id}", "0" * 32), timeout=PATIENCE
            )
            wanted = {200} if path in {"/livez", "/readyz", "/health", "/metrics"} else {401}
            assert answer.status_code in wanted, (verb, path)


def test_a_trace_goes_from_the_caller_to_the_worker(server, client):
    assert sorted(span.name for span in traced(server, client)) == ["POST /margin", "inference", "queue", "tokenize"]
