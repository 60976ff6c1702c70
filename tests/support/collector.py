"""A collector of traces, to which OpenTelemetry's own exporter sends what it would send to any other."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class Seen:
    """One span of a process."""

    service: str
    name: str
    trace: str
    id: str
    parent: str


@dataclass
class Collector:
    """``bodies`` are the requests that came, as they were."""

    url: str
    bodies: list[bytes] = field(default_factory=list)

    @property
    def spans(self) -> list[Seen]:
        parts = [
            part for body in list(self.bodies) for part in ExportTraceServiceRequest.FromString(body).resource_spans
        ]
        return [
            Seen(_service(part), span.name, span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
            for part in parts
            for scope in part.scope_spans
            for span in scope.spans
        ]


def _service(part) -> str:
    return next(each.value.string_value for each in part.resource.attributes if each.key == "service.name")


@contextmanager
def collector() -> Iterator[Collector]:
    """One that listens on a free port."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            known = self.path == "/v1/traces"
            if known:
                collecting.bodies.append(body)
            self.send_response(200 if known else 404)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collecting = Collector(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield collecting
        finally:
            server.shutdown()
            thread.join()
