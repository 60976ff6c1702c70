"""Request ids, timing, metrics and the one event per request."""

from __future__ import annotations

import gzip
import io
import json
import logging

import pytest

from inward import logs, metrics
from support.fake_services import MAX_TOKENS, FakeServices, error

PAIR = {"prompt": "p", "chosen": "aa", "rejected": "b"}


def sample(name: str, **labels: str) -> float:
    return metrics.REGISTRY.get_sample_value(name, labels) or 0.0


@pytest.fixture
def log():
    """What is logged, as a stream; the set-up of logging is put back afterwards."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    stream = io.StringIO()
    logs.configure("debug", json=True, stream=stream)
    yield stream
    root.handlers[:], root.level = before


@pytest.mark.parametrize("given", ["abc-123", "a" * 128, "trace:1/2+3=="])
async def test_a_request_id_is_kept(api, given):
    assert (await api.get("/info", headers={"x-request-id": given})).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "a b", "a" * 129, "é", "<script>"])
async def test_an_unfit_request_id_is_replaced(api, given):
    made = (await api.get("/info", headers={"x-request-id": given.encode()})).headers["x-request-id"]
    assert len(made) == 32 and made.isalnum()


@pytest.mark.parametrize("path", ["/info", "/nothing", "/metrics", "/docs"])
async def test_every_answer_says_how_long_it_took(api, path):
    response = await api.get(path)
    assert float(response.headers["x-total-time"]) >= 0
    assert response.headers["x-request-id"]


async def test_requests_are_counted_by_route_template_and_code(api):
    names = [
        ("/margin", "200"),
        ("/margin", "422"),
        ("/heads/{name}", "200"),
        ("/heads/{name}", "404"),
        ("other", "404"),
    ]
    before = [sample("inward_requests_total", route=route, code=code) for route, code in names]
    seconds = sample("inward_request_duration_seconds_count", route="/margin")
    await api.post("/margin", {"pairs": [PAIR]})
    await api.post("/margin", {})
    await api.get("/heads/harmless")
    await api.get("/heads/nobody")
    await api.get("/some/unknown/path")
    assert [sample("inward_requests_total", route=route, code=code) for route, code in names] == [n + 1 for n in before]
    assert sample("inward_request_duration_seconds_count", route="/margin") == seconds + 2
    assert sample("inward_requests_in_flight") == 0


async def test_refused_strangers_are_counted_too():
    before = sample("inward_requests_total", route="/margin", code="401")
    await FakeServices(keys=frozenset({"k"})).post("/margin", {"pairs": [PAIR]})
    assert sample("inward_requests_total", route="/margin", code="401") == before + 1


async def test_one_event_a_request_says_route_code_time_and_id(api, log):
    await api.post("/margin", {"pairs": [PAIR]}, headers={"x-request-id": "abc"})
    (event,) = [e for e in map(json.loads, log.getvalue().splitlines()) if e["event"] == "request"]
    assert event["ms"] >= 0
    assert {key: event[key] for key in ("method", "route", "code", "request_id", "level")} == {
        "method": "POST", "route": "/margin", "code": 200, "request_id": "abc", "level": "info",
    }  # fmt: skip


async def test_no_text_of_a_request_is_ever_logged_or_measured(api, log):
    marker = "zanzibar4711"
    bodies = [
        {"pairs": [{"prompt": marker, "chosen": marker, "rejected": marker}]},
        {"pairs": [{"prompt": marker, "chosen": marker * MAX_TOKENS, "rejected": marker}]},
        {"pairs": [{"prompt": [{"role": marker, "content": marker}], "chosen": marker, "rejected": marker}]},
        {"pairs": marker},
    ]
    for body in bodies:
        await api.post("/margin", body)
    await api.post("/margin", b'{"pairs": "' + marker.encode())

    async def broken(*args, **kwargs):
        raise ValueError(marker)

    api.intake.score = broken
    await api.post("/margin", bodies[0])
    await api.get("/" + marker)
    await api.get("/heads/" + marker)
    written = log.getvalue()
    assert "request_failed" in written and "ValueError" in written
    assert marker not in written
    assert marker not in (await api.get("/metrics")).text


@pytest.mark.parametrize(
    "path",
    [
        "/info",
        "/heads",
        "/heads/harmless",
        "/policy",
        "/livez",
        "/readyz",
        "/health",
        "/metrics",
        "/docs",
        "/openapi.json",
    ],
)
async def test_head_works_wherever_get_does_and_has_its_headers_without_a_body(api, path):
    async with api.client() as client:
        got, head = await client.get(path), await client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    mine = {"x-request-id", "x-total-time", "content-length"}
    assert {k: v for k, v in head.headers.items() if k not in mine} == {
        k: v for k, v in got.headers.items() if k not in mine
    }
    if path != "/metrics":  # which grows with every request
        assert head.headers["content-length"] == got.headers["content-length"]


async def test_head_is_refused_where_there_is_no_get_and_counted_under_its_route(api):
    async with api.client() as client:
        assert (await client.head("/margin")).status_code == 405
        assert (await client.head("/nothing")).status_code == 404
        before = sample("inward_requests_total", route="/heads/{name}", code="404")
        assert (await client.head("/heads/nobody")).status_code == 404
    assert sample("inward_requests_total", route="/heads/{name}", code="404") == before + 1


@pytest.mark.parametrize("path", ["/margin", "/jobs?kind=margin", "/get_reward"])
async def test_a_body_in_an_encoding_that_is_not_taken_is_a_415_that_says_so(api, path):
    answer = await api.post(
        path, gzip.compress(json.dumps({"pairs": [PAIR]}).encode()), headers={"content-encoding": "gzip"}
    )
    assert answer.status_code == 415
    assert error(answer)["param"] == "content-encoding" and "'gzip' is not taken" in error(answer)["message"]
    assert answer.headers["accept-encoding"] == "identity"
    assert api.intake.calls == []


async def test_identity_is_no_encoding(api):
    assert (await api.post("/margin", {"pairs": [PAIR]}, headers={"content-encoding": "identity"})).status_code == 200


async def test_a_probe_is_told_of_only_where_its_answer_changes(api, log):
    async def probed():
        for path in ("/livez", "/readyz", "/readyz", "/metrics"):
            await api.get(path)
        return [(e["route"], e["level"]) for e in map(json.loads, log.getvalue().splitlines()) if e["level"] != "debug"]

    assert await probed() == []
    api.readiness = (False, "no worker takes jobs from the queue")
    assert await probed() == [("/readyz", "warning")]
    api.readiness = (True, "ready")
    assert await probed() == [("/readyz", "warning"), ("/readyz", "info")]
