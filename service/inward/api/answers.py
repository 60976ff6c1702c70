"""Bytes that leave the service: answers with their timing headers, and every error in the one shape."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from inward.errors import InwardError, OverQuota, Unauthorized, Unavailable
from inward.types import Timing
from inward.wire import Answer

JSON = "application/json"


def plain(body: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON in ASCII, so that no text, not even half a surrogate pair, can fail to be encoded."""
    return Response(json.dumps(body, allow_nan=False), status, headers, JSON)


def scored(answer: Answer, timing: Timing) -> Response:
    """An answer with scores."""
    return Response(answer.model_dump_json(), 200, timing_headers(timing), JSON)


def timing_headers(timing: Timing) -> dict[str, str]:
    """Milliseconds in the queue and on the device; ``x-total-time`` is added by the middleware."""
    return {"x-queue-time": f"{1000 * timing.queued:.2f}", "x-inference-time": f"{1000 * timing.inference:.2f}"}


def refusal(error: InwardError, *, status: int | None = None, headers: Mapping[str, str] | None = None) -> Response:
    """An error of the tree, with the headers that its status asks for."""
    extra = dict(headers or {})
    if isinstance(error, Unavailable | OverQuota):
        extra["retry-after"] = str(max(1, math.ceil(error.retry_after or 1.0)))
    if isinstance(error, Unauthorized):
        extra["www-authenticate"] = 'Bearer realm="inward", Basic realm="inward"'
    return plain(error.body(), status=status or error.status, headers=extra)
