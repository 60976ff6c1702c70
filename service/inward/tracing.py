"""Traces of requests, sent by OTLP where an endpoint is set: ``request`` with ``tokenize``, ``queue`` and ``inference``
below it.

OpenTelemetry is an optional extra; until ``configure`` is given an endpoint nothing of it is imported and nothing is
recorded. The span of a request belongs to the caller's trace if there is one (W3C ``traceparent``), and travels with
the jobs, so that the spans of the worker are below it. Attributes are routes, codes and numbers: never text, nor the
message of an exception, which may quote some.

On request every score is an event ``gen_ai.evaluation.result`` of its own as well, as OpenTelemetry's conventions for
generative AI have it, under the span of its request: tools that watch language models show it beside the caller's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from inward import __version__
from inward.errors import SetupError
from inward.types import Failed, Job, Outcome, Scored

if TYPE_CHECKING:
    from opentelemetry._logs import Logger
    from opentelemetry.context import Context
    from opentelemetry.sdk._logs import LogRecordProcessor
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Span as Span
    from opentelemetry.trace import Tracer

_tracer: Tracer | None = None
_events: Logger | None = None
PATH = "/v1/traces"
"""Where a collector takes traces."""
EVENTS_PATH = "/v1/logs"
"""Where a collector takes events."""
EVALUATION = "gen_ai.evaluation.result"


def configure(endpoint: str | None, role: str, *, evaluations: bool = False) -> None:
    """Sends traces to the collector at ``endpoint``, such as ``http://localhost:4318``; None: there are none.

    They are sent from a thread of their own and dropped where the collector does not keep up, so no request ever waits
    for them. Sampling, headers, timeouts and batches are set by the standard variables ``OTEL_*``.

    Args:
        evaluations: also send an event for each score.

    Raises:
        SetupError: OpenTelemetry is not installed.
    """
    if endpoint is None:
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise SetupError("--otlp-endpoint needs OpenTelemetry: pip install '.[otel]' in Inward's folder") from None
    base = endpoint.rstrip("/").removesuffix(PATH)
    record(BatchSpanProcessor(OTLPSpanExporter(base + PATH)), role)
    if evaluations:
        from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
        from opentelemetry.sdk._logs.export import BatchLogRecordProcessor

        record_evaluations(BatchLogRecordProcessor(OTLPLogExporter(base + EVENTS_PATH)), role)


def record(processor: SpanProcessor, role: str) -> None:
    """Records spans from now on and gives them to ``processor``; at the end of the process it is flushed.

    The provider is ours alone: what libraries record for themselves stays out of our traces.
    """
    global _tracer
    from opentelemetry.sdk.trace import TracerProvider

    provider = TracerProvider(resource=_resource(role))
    provider.add_span_processor(processor)
    _tracer = provider.get_tracer("inward", __version__)


def record_evaluations(processor: LogRecordProcessor, role: str) -> None:
    """Gives an event for each score to ``processor`` from now on."""
    global _events
    from opentelemetry.sdk._logs import LoggerProvider

    provider = LoggerProvider(resource=_resource(role))
    provider.add_log_record_processor(processor)
    _events = provider.get_logger("inward", __version__)


def _resource(role: str) -> Resource:
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource

    ours = {"service.name": f"inward-{role}", "service.version": __version__}
    return Resource.create({**ours, **OTELResourceDetector().detect().attributes})


@contextmanager
def request(headers: Mapping[str, str]) -> Iterator[Span | None]:
    """The span of a request with these headers, until its answer is sent; None where traces are off. ``answered``
    completes it.
    """
    if _tracer is None:
        yield None
        return
    from opentelemetry.trace import SpanKind

    above = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
    with _tracer.start_as_current_span(
        "request", context=_context(above), kind=SpanKind.SERVER, record_exception=False, set_status_on_exception=False
    ) as span:
        yield span


def answered(span: Span | None, *, method: str, route: str, code: int) -> dict[str, str]:
    """Says what became of a request; gives what its event should name, so that logs and traces are found from each
    other.
    """
    if span is None:
        return {}
    from opentelemetry.trace import StatusCode, format_trace_id

    span.update_name(f"{method} {route}")
    span.set_attributes({"http.request.method": method, "http.route": route, "http.response.status_code": code})
    if code >= 500:
        span.set_status(StatusCode.ERROR)
    return {"trace_id": format_trace_id(span.get_span_context().trace_id)}


@contextmanager
def step(name: str) -> Iterator[None]:
    """A span of one step of the present request."""
    if _tracer is None:
        yield
        return
    with _tracer.start_as_current_span(name, record_exception=False, set_status_on_exception=False):
        yield


def present() -> str:
    """The span that is open here, as a ``traceparent``; empty where traces are off."""
    if _tracer is None:
        return ""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get("traceparent", "")


def computed(batch: Sequence[Job], outcomes: Sequence[Outcome]) -> None:
    """Records ``queue`` and ``inference`` of a batch that is done: once for each request that has jobs in it, below
    its span.
    """
    if _tracer is None:
        return
    done = {outcome.job_id: outcome for outcome in outcomes}
    requests: dict[str, list[tuple[Job, Outcome]]] = {}
    for job in batch:
        if job.trace and job.id in done:
            requests.setdefault(job.trace, []).append((job, done[job.id]))
    tokens = sum(job.group.tokens for job in batch)
    for trace, jobs in requests.items():
        _computed(_tracer, trace, jobs, {"inward.batch.jobs": len(batch), "inward.batch.tokens": tokens})
        if _events is not None:
            for _, outcome in jobs:
                if isinstance(outcome, Scored):
                    _evaluated(_events, _context({"traceparent": trace}), outcome)


def _evaluated(events: Logger, context: Context, scored: Scored) -> None:
    """One event for each finite score of each head."""
    from opentelemetry._logs import LogRecord

    for ref, scores in zip(scored.heads, scored.scores, strict=True):
        for n, score in enumerate(scores.scores_N):
            if score is None:
                continue
            attributes: dict[str, str | int | float] = {
                "gen_ai.evaluation.name": ref.name,
                "gen_ai.evaluation.score.value": score,
                "inward.head.kind": ref.kind,
                "inward.head.version": ref.version,
                "inward.policy.version": scored.policy_version,
                "inward.response": n,
            }
            if (probability := scores.probability(n)) is not None:
                attributes["inward.probability"] = probability
            events.emit(
                LogRecord(timestamp=time.time_ns(), context=context, event_name=EVALUATION, attributes=attributes)
            )


def _computed(tracer: Tracer, trace: str, jobs: Sequence[tuple[Job, Outcome]], batch: Mapping[str, int]) -> None:
    from opentelemetry.trace import StatusCode

    context = _context({"traceparent": trace})
    job, outcome = min(jobs, key=lambda each: each[0].enqueued)
    begun = job.enqueued + outcome.timing.queued
    own = {"inward.jobs": len(jobs), "inward.deliveries": max(job.deliveries for job, _ in jobs)}
    queue = tracer.start_span("queue", context, attributes=own, start_time=_ns(job.enqueued))
    queue.end(_ns(begun))
    inference = tracer.start_span("inference", context, attributes={**own, **batch}, start_time=_ns(begun))
    if failures := sorted({outcome.code for _, outcome in jobs if isinstance(outcome, Failed)}):
        inference.set_attribute("error.type", failures[0])
        inference.set_status(StatusCode.ERROR)
    inference.end(_ns(begun + outcome.timing.inference))


def _context(carrier: Mapping[str, str]) -> Context:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract(carrier)


def _ns(seconds: float) -> int:
    return round(1e9 * seconds)
