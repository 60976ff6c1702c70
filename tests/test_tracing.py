"""One trace from the caller's span through the API to the worker, and nothing of what was sent in it."""

import asyncio
import subprocess
import sys
from contextlib import asynccontextmanager
from dataclasses import replace

import httpx
import pytest
from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter, SimpleLogRecordProcessor
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from inward import tracing
from inward.api.app import create_app
from inward.backbones.fake import FakeBackbone
from inward.engine import Engine
from inward.intake import Intake
from inward.worker import Worker
from support.corridor import FakeHead, FakeRegistry
from support.fake_services import FakeServices
from support.queues import InMemory, done, in_redis, job
from support.waiting import PATIENCE, until

CALLER = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
MARKER = "Qzxmarkerqzx"
PAIRS = [{"prompt": f"{MARKER} {i}", "chosen": MARKER, "rejected": "other"} for i in range(3)]


@pytest.fixture
def spans(monkeypatch):
    """A function that gives the spans that ended so far, by name."""
    exporter = InMemorySpanExporter()
    monkeypatch.setattr(tracing, "_tracer", None)
    tracing.record(SimpleSpanProcessor(exporter), "test")
    return lambda: {span.name: span for span in exporter.get_finished_spans()}


@pytest.fixture(params=["memory", "redis"])
def queue(request):
    """A function that opens a queue of one kind."""
    if request.param == "redis":
        url = request.getfixturevalue("redis_server").url
        return lambda: in_redis(url)

    @asynccontextmanager
    async def in_memory():
        yield InMemory(100_000)

    return in_memory


@asynccontextmanager
async def api(queue):
    """A client of the app on ``queue``, whose worker runs, and its backbone."""
    backbone = FakeBackbone()
    registry = FakeRegistry(FakeHead("harmless"), FakeHead("helpful"))
    async with queue() as q:
        app = create_app(replace(FakeServices().services, intake=Intake(q.producer)))
        working = asyncio.create_task(Worker(q.consumer, Engine(backbone, registry)).run())
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app), base_url="http://inward", timeout=PATIENCE
        ) as client:
            yield client, backbone
        await q.consumer.close()
        await asyncio.wait_for(working, PATIENCE)


def text_of(spans):
    return "".join(span.to_json() for span in spans.values())


async def test_a_request_is_one_trace_from_its_caller_to_the_worker(spans, queue):
    async with api(queue) as (client, _):
        answer = await client.post("/margin", json={"pairs": PAIRS}, headers={"traceparent": CALLER})
        assert answer.status_code == 200
        ended = await until(lambda: len(spans()) == 4 and spans())
    request = ended["POST /margin"]
    assert (request.kind, request.parent.trace_id, request.parent.span_id) == (
        SpanKind.SERVER,
        int(CALLER[3:35], 16),
        int(CALLER[36:52], 16),
    )
    assert request.attributes == {
        "http.request.method": "POST",
        "http.route": "/margin",
        "http.response.status_code": 200,
    }
    for name in ("tokenize", "queue", "inference"):
        assert (ended[name].context.trace_id, ended[name].parent.span_id) == (
            request.context.trace_id,
            request.context.span_id,
        ), name
    assert ended["inference"].attributes["inward.jobs"] == 3
    assert (
        ended["queue"].start_time
        <= ended["queue"].end_time
        == ended["inference"].start_time
        <= ended["inference"].end_time
    )
    assert ended["queue"].resource.attributes["service.name"] == "inward-test"


async def test_a_trace_holds_nothing_of_what_was_sent_even_where_it_fails(spans, queue):
    async with api(queue) as (client, backbone):
        backbone.fail_on(lambda group: True)
        assert (await client.post("/margin", json={"pairs": PAIRS})).status_code == 500
        for path, body in {
            "/margin": {"pairs": MARKER},
            f"/{MARKER}": {},
            "/score": {"items": [{"prompt": MARKER, "response": MARKER * 99}]},
        }.items():
            assert (
                await client.post(path, json=body, params={"q": MARKER}, headers={"traceparent": MARKER})
            ).status_code >= 400
        ended = await until(lambda: "inference" in spans() and "POST other" in spans() and spans())
    assert ended["inference"].attributes["error.type"] == "internal_error"
    assert {ended[name].status.status_code for name in ("POST /margin", "inference")} >= {StatusCode.ERROR}
    assert MARKER.lower() not in text_of(ended).lower()


def test_a_job_of_a_replica_that_does_not_trace_makes_no_spans_in_a_worker_that_does(spans):
    tracing.computed([job("a"), job("b", trace=CALLER)], [done(job("b"))])
    tracing.computed([job("c")], [done(job("c"))])
    assert {span.parent.span_id for span in spans().values()} == {int(CALLER[36:52], 16)}


async def test_health_and_metrics_leave_no_trace(spans):
    async with FakeServices().client() as client:
        for path in ("/livez", "/readyz", "/health", "/metrics", "/info"):
            assert (await client.get(path)).status_code == 200
    assert list(spans()) == ["GET /info"]


def test_nothing_of_opentelemetry_is_imported_where_no_endpoint_is_set():
    code = (
        "import sys; from inward import tracing; import inward.api.app, inward.worker\n"
        "tracing.configure(None, 'api')\n"
        "with tracing.request({}) as span, tracing.step('tokenize'):\n"
        "    assert (span, tracing.present(), tracing.answered(span, method='GET', route='/', code=200)) == (None, '', "
        "{})\n"
        "print([name for name in sys.modules if name.startswith(('opentelemetry.sdk.trace', "
        "'opentelemetry.exporter'))])\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.fixture
def evaluations(monkeypatch, spans):
    """A function that gives the events of scores so far, as attributes with the ids that they are under."""
    exporter = InMemoryLogRecordExporter()
    monkeypatch.setattr(tracing, "_events", None)
    tracing.record_evaluations(SimpleLogRecordProcessor(exporter), "test")
    return lambda: [each.log_record for each in exporter.get_finished_logs()]


async def test_each_score_is_an_event_under_the_span_of_its_request_without_text(queue, spans, evaluations):
    async with api(queue) as (client, _):
        answer = await client.post("/margin", json={"pairs": PAIRS}, headers={"traceparent": CALLER})
        assert answer.status_code == 200
        await until(lambda: len(evaluations()) >= 12)
    events = evaluations()
    scores = {round(m[name], 6) for m in answer.json()["margins"] for name in ("chosen_score", "rejected_score")}
    assert {event.event_name for event in events} == {"gen_ai.evaluation.result"}
    assert {event.attributes["gen_ai.evaluation.name"] for event in events} == {"harmless", "helpful"}
    of_margin = [event for event in events if event.attributes["gen_ai.evaluation.name"] == "harmless"]
    assert {round(event.attributes["gen_ai.evaluation.score.value"], 6) for event in of_margin} == scores
    request = spans()["POST /margin"]
    assert {(event.trace_id, event.span_id) for event in events} == {
        (request.context.trace_id, request.context.span_id)
    }
    assert f"{request.context.trace_id:032x}" == CALLER.split("-")[1]
    assert not any(MARKER in str(event) for event in events)


async def test_without_being_asked_for_scores_are_no_events(queue, spans, monkeypatch):
    monkeypatch.setattr(tracing, "_evaluated", None)  # would raise
    async with api(queue) as (client, _):
        assert (await client.post("/margin", json={"pairs": PAIRS})).status_code == 200
