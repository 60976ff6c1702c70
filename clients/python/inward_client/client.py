"""The client for ordinary code: the methods of ``AsyncInward``, waited for."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from functools import partial, wraps
from inspect import signature
from typing import Any, Concatenate, ParamSpec, TypeVar

import httpx

from inward_client import event_loop
from inward_client.aio import AsyncInward
from inward_client.retries import DEFAULT, Retries

P = ParamSpec("P")
T = TypeVar("T")


def _waited_for(
    method: Callable[Concatenate[AsyncInward, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Inward, P], T]:
    @wraps(method)
    def wait(self: Inward, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return event_loop.run(method(self._client, *args, **kwargs))

    return wait


def _iterated(
    method: Callable[Concatenate[AsyncInward, P], AsyncIterator[T]],
) -> Callable[Concatenate[Inward, P], Iterator[T]]:
    @wraps(method)
    def iterate(self: Inward, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        events: Any = method(self._client, *args, **kwargs)
        try:
            while (event := event_loop.run(_next(events))) is not None:
                yield event
        finally:
            event_loop.run(events.aclose())

    asynchronous = signature(method)
    blocking = str(asynchronous.return_annotation).removeprefix("Async")
    iterate.__dict__["__signature__"] = asynchronous.replace(return_annotation=blocking)
    return iterate


async def _next(events: AsyncIterator[T]) -> T | None:
    return await anext(events, None)


class Inward:
    """A service at ``url``. Safe to share between threads; close it, or use it in a ``with`` statement.

    Args:
        url: by default ``INWARD_URL``, or http://127.0.0.1:8080.
        api_key: by default ``INWARD_API_KEY``.
        timeout: seconds for one try of a call that has no timeout of its own.
        retries: how patient to be.
        batch_size: most elements of one request; longer lists are sent as several.
        concurrency: most requests of one call under way at once.
        headers: sent with each request.
        http: an httpx client to use instead of an own one; it is the caller's to close.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float = 100.0,
        retries: Retries = DEFAULT,
        batch_size: int = 64,
        concurrency: int = 8,
        headers: Mapping[str, str] | None = None,
        http: httpx.AsyncClient | None = None,
    ) -> None:
        self._open = partial(
            AsyncInward, url, api_key=api_key, timeout=timeout, retries=retries, batch_size=batch_size,
            concurrency=concurrency, headers=headers, http=http,
        )  # fmt: skip
        self._process, self._opened = os.getpid(), self._open()

    @property
    def _client(self) -> AsyncInward:
        """A fork opens connections of its own."""
        if self._process != os.getpid():
            self._process, self._opened = os.getpid(), self._open()
        return self._opened

    def __enter__(self) -> Inward:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    margin = _waited_for(AsyncInward.margin)
    score = _waited_for(AsyncInward.score)
    reward = _waited_for(AsyncInward.reward)
    reward_pairs = _waited_for(AsyncInward.reward_pairs)
    rerank = _waited_for(AsyncInward.rerank)
    rerank_stream = _iterated(AsyncInward.rerank_stream)
    heads = _waited_for(AsyncInward.heads)
    head = _waited_for(AsyncInward.head)
    activate = _waited_for(AsyncInward.activate)
    update = _waited_for(AsyncInward.update)
    policy = _waited_for(AsyncInward.policy)
    load_policy = _waited_for(AsyncInward.load_policy)
    sleep = _waited_for(AsyncInward.sleep)
    wake = _waited_for(AsyncInward.wake)
    create_job = _waited_for(AsyncInward.create_job)
    job = _waited_for(AsyncInward.job)
    cancel_job = _waited_for(AsyncInward.cancel_job)
    job_results = _waited_for(AsyncInward.job_results)
    info = _waited_for(AsyncInward.info)
    health = _waited_for(AsyncInward.health)
    close = _waited_for(AsyncInward.close)
