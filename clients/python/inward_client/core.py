"""Requests from calls, failures from answers, and the decision to try again: what a client does without waiting."""

from __future__ import annotations

import json
import math
import os
import random
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx

from inward_client.calls import JSONL, Call, encoded
from inward_client.errors import ConnectionFailed, InwardError, StatusError, TimedOut, UnreadableAnswer, of_status
from inward_client.retries import Retries, wait_before_retry

T = TypeVar("T")
DEFAULT_URL = "http://127.0.0.1:8080"
CONNECT_S = 5.0
"""Seconds in which a connection must stand, if a call may take that long."""
ANSWER_S = 5.0
"""Seconds in which the service's own 504 must come, after a deadline that it was told."""
DONE_NOTHING = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
"""Failures before anything was sent."""


@dataclass(frozen=True)
class Core:
    """How a client calls its service."""

    url: str
    headers: Mapping[str, str] = field(repr=False)
    timeout: float
    retries: Retries
    batch_size: int
    concurrency: int

    @classmethod
    def of(
        cls,
        url: str | None,
        api_key: str | None,
        timeout: float,
        retries: Retries,
        batch_size: int,
        concurrency: int,
        headers: Mapping[str, str] | None,
    ) -> Core:
        """From the arguments of a client; ``INWARD_URL`` and ``INWARD_API_KEY`` stand in for what is not given.

        Raises:
            ValueError: an argument that can't be meant.
        """
        if batch_size < 1 or concurrency < 1:
            raise ValueError("batch_size and concurrency are at least 1")
        key = os.environ.get("INWARD_API_KEY") if api_key is None else api_key
        own = {"accept": "application/json", **({"authorization": f"Bearer {key}"} if key else {}), **(headers or {})}
        address = (url or os.environ.get("INWARD_URL") or DEFAULT_URL).rstrip("/")
        _check_url(address)
        return cls(address, own, _above_0(timeout), retries, batch_size, concurrency)

    def limits(self) -> httpx.Limits:
        """As many connections as requests may be under way, all kept."""
        return httpx.Limits(max_connections=None, max_keepalive_connections=max(2 * self.concurrency, 20))

    def request(self, http: httpx.AsyncClient, call: Call[Any], timeout: float | None) -> httpx.Request:
        """The request, with an idempotency key of its own: it is sent again as it is.

        Raises:
            ValueError: no time for it, or a number in it that JSON has not.
        """
        seconds = self.timeout if timeout is None else _above_0(timeout)
        headers = dict(self.headers)
        content = call.content
        if call.method == "POST":
            headers["content-type"] = JSONL if content is not None else "application/json"
            if not call.stream:
                headers["idempotency-key"] = call.key or uuid.uuid4().hex
        told = call.deadline and timeout is not None
        if call.body is not None:
            content = encoded({**call.body, **({"timeout": float(seconds)} if told else {})})
        patience = httpx.Timeout(seconds, connect=min(CONNECT_S, seconds), read=seconds + ANSWER_S if told else seconds)
        return http.build_request(
            call.method,
            self.url + call.path,
            params=dict(call.params) or None,
            content=content,
            headers=headers,
            timeout=patience,
        )

    def result(self, call: Call[T], response: httpx.Response) -> T:
        """What the answer says.

        Raises:
            StatusError: the service refused.
            UnreadableAnswer: the answer is not the service's.
        """
        if not response.is_success:
            raise refusal(response)
        is_jsonl = response.headers.get("content-type", "").startswith(JSONL)
        try:
            return call.read(_lines(response.text) if is_jsonl else response.json())
        except UnreadableAnswer:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UnreadableAnswer(f"the answer to {call.method} {call.path} can't be read: {error}") from None

    def wait(self, failure: InwardError, tries: int, failing_s: float, call: Call[Any]) -> float | None:
        """Seconds until the call is tried again; None gives up."""
        return wait_before_retry(
            failure, tries, failing_s, self.retries, repeatable=call.repeatable, chance=random.random()
        )


def refusal(response: httpx.Response) -> StatusError:
    """The error that an answer stands for, also one that comes from a proxy in between."""
    told: Mapping[str, Any] = {}
    with suppress(ValueError):
        body = response.json()
        inner = body.get("error") if isinstance(body, dict) else None
        told = inner if isinstance(inner, dict) else {}
    return of_status(response.status_code)(
        str(told.get("message") or response.reason_phrase or "no reason is given"),
        status=response.status_code,
        code=str(told.get("code") or ""),
        param=told.get("param"),
        request_id=response.headers.get("x-request-id"),
        retry_after=_seconds(response.headers.get("retry-after", "")),
    )


def no_answer(error: httpx.RequestError, request: httpx.Request) -> ConnectionFailed:
    """The error for an exception of the transport."""
    # no password in it
    said = f"{request.method} {request.url.copy_with(userinfo=b'')}: {str(error) or type(error).__name__}"
    kind = TimedOut if isinstance(error, httpx.TimeoutException) else ConnectionFailed
    return kind(said, sent=not isinstance(error, DONE_NOTHING))


def _check_url(url: str) -> None:
    try:
        found = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"url can't be read: {error}") from None
    if found.scheme not in ("http", "https") or not found.host:
        raise ValueError("url must begin with http:// or https:// and the name of a host")


def _above_0(timeout: float) -> float:
    if not 0 < timeout < math.inf:
        raise ValueError(f"timeout must be a number of seconds above 0, not {timeout:g}")
    return timeout


def _seconds(header: str) -> float | None:
    """Of ``Retry-After``; a date, which the service does not send, counts as none."""
    try:
        seconds = float(header)
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) else None


def _lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.split("\n") if line]
