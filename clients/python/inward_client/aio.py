"""The client, as coroutines. ``client.Inward`` is its face for ordinary code."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import httpx

from inward_client import calls
from inward_client.answers import (
    Answer,
    Head,
    HeadInfo,
    Health,
    Job,
    Margin,
    MarginAnswer,
    Policy,
    RerankAnswer,
    RewardAnswer,
    RewardPair,
    RewardPairAnswer,
    Score,
    ScoreAnswer,
)
from inward_client.batches import Batches, Part
from inward_client.calls import Call, Element, Prompt
from inward_client.core import Core, no_answer, refusal
from inward_client.errors import InwardError, StatusError, Unavailable
from inward_client.events import Event, Events
from inward_client.progress import bar
from inward_client.retries import DEFAULT, Retries

T = TypeVar("T")
R = TypeVar("R")
A = TypeVar("A", bound=Answer)


class AsyncInward:
    """A service at ``url``. It belongs to the event loop in which it is first used; close it, or use it in an ``async
    with`` statement.

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
        self._core = Core.of(url, api_key, timeout, retries, batch_size, concurrency, headers)
        self._owned = http is None
        self._http = http or httpx.AsyncClient(limits=self._core.limits())

    async def __aenter__(self) -> AsyncInward:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections."""
        if self._owned:
            await self._http.aclose()

    async def margin(
        self,
        pairs: Iterable[Element],
        *,
        head: str | None = None,
        truncate: bool = False,
        timeout: float | None = None,
        progress: bool = False,
    ) -> MarginAnswer:
        """Margins of preference pairs (`POST /margin`), any number of them.

        Args:
            pairs: each with `prompt` (or `messages`), `chosen` and `rejected`; other keys are not sent.
            head: by default the first LEGEND head that is loaded.
            truncate: cut text that is longer than the model takes instead of refusing it.
            timeout: seconds for one try of one request, also told to the service.
            progress: show a bar (needs tqdm).

        Raises:
            InwardError: no pair could be scored, or the service could not do its part.
        """
        ask = partial(calls.margin, head=head, truncate=truncate)
        batches = Batches(pairs, self._core.batch_size, ask, "pairs", "margins", Margin)
        return await self._send_all(batches, timeout, progress)

    async def score(
        self,
        items: Iterable[Element],
        *,
        head: str | None = None,
        detail: Sequence[Literal["layers", "tokens"]] = (),
        truncate: bool = False,
        timeout: float | None = None,
        progress: bool = False,
    ) -> ScoreAnswer:
        """Scores of responses (`POST /score`), any number of them.

        Args:
            items: each with `prompt` and `response`, or `messages` that end with the assistant's; other keys are not
                sent.
            head: by default the first LEGEND head that is loaded.
            detail: each layer's part of the score, the score at every token.
            truncate: cut text that is longer than the model takes instead of refusing it.
            timeout: seconds for one try of one request, also told to the service.
            progress: show a bar (needs tqdm).

        Raises:
            InwardError: no item could be scored, or the service could not do its part.
        """
        ask = partial(calls.score, head=head, truncate=truncate, detail=detail)
        batches = Batches(items, self._core.batch_size, ask, "items", "scores", Score)
        return await self._send_all(batches, timeout, progress)

    async def reward(
        self,
        items: Iterable[Element],
        *,
        head: str | None = None,
        detail: Sequence[Literal["layers", "tokens"]] = (),
        truncate: bool = False,
        timeout: float | None = None,
        progress: bool = False,
    ) -> RewardAnswer:
        """Hybrid rewards of responses (`POST /reward` with items), any number of them.

        Args:
            items: each with `prompt` and `response`, or `messages` that end with the assistant's; other keys are not
                sent.
            head: by default the first hybrid head that is loaded.
            detail: each layer's probe output and gate weight, the score at every token.
            truncate: cut text that is longer than the model takes instead of refusing it.
            timeout: seconds for one try of one request, also told to the service.
            progress: show a bar (needs tqdm).

        Raises:
            InwardError: no item could be scored, or the service could not do its part.
        """
        ask = partial(calls.reward, head=head, truncate=truncate, detail=detail)
        batches = Batches(items, self._core.batch_size, ask, "items", "rewards", Score)
        return await self._send_all(batches, timeout, progress)

    async def reward_pairs(
        self,
        pairs: Iterable[Element],
        *,
        head: str | None = None,
        detail: Sequence[Literal["layers", "tokens"]] = (),
        truncate: bool = False,
        timeout: float | None = None,
        progress: bool = False,
    ) -> RewardPairAnswer:
        """Hybrid rewards of both answers of pairs, and the confidence that the label is right (`POST /reward` with
        pairs).

        Args:
            pairs: each with `prompt` (or `messages`), `chosen` and `rejected`; other keys are not sent.
            head: by default the first hybrid head that is loaded.
            detail: each layer's probe output and gate weight, the score at every token.
            truncate: cut text that is longer than the model takes instead of refusing it.
            timeout: seconds for one try of one request, also told to the service.
            progress: show a bar (needs tqdm).

        Raises:
            InwardError: no pair could be scored, or the service could not do its part.
        """
        ask = partial(calls.reward_pairs, head=head, truncate=truncate, detail=detail)
        batches = Batches(pairs, self._core.batch_size, ask, "pairs", "rewards", RewardPair)
        return await self._send_all(batches, timeout, progress)

    async def rerank(
        self,
        prompt: Prompt,
        candidates: Iterable[str] | None = None,
        *,
        n: int | None = None,
        sampling: Mapping[str, Any] | None = None,
        head: str | None = None,
        truncate: bool = False,
        return_token_ids: bool = False,
        append_to: str | None = None,
        early_rejection: Mapping[str, Any] | None = None,
        stop_when: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> RerankAnswer:
        """Ranks candidates, or draws `n` answers and ranks those (`POST /rerank`).

        Args:
            prompt: a text, or chat messages.
            candidates: the answers to rank.
            n: instead of them, how many to draw.
            sampling: how they are drawn: `temperature`, `top_p`, `top_k`, `max_tokens`, `seed`, ….
            head: by default the first hybrid head that is loaded, else another.
            truncate: cut text that is longer than the model takes instead of refusing it.
            return_token_ids: give each answer's token ids as well.
            append_to: name of a stream to which best against worst is appended, for trainers that consume it.
            early_rejection: which drawn answers are not drawn to their end: `keep` and `at`, or `max_loss`.
            stop_when: when a guard ends a drawn answer: `below`, `probability` or `fpr`, `head`, `pool`, `after`.
            timeout: seconds for one try, also told to the service.

        Raises:
            InwardError: no candidate could be scored, or the service could not do its part.
        """
        call = calls.rerank(
            prompt, candidates, head=head, truncate=truncate, n=n, sampling=sampling,
            return_token_ids=return_token_ids or None, append_to=append_to, early_rejection=early_rejection,
            stop_when=stop_when,
        )  # fmt: skip
        return await self._send(call, timeout)

    async def rerank_stream(
        self,
        prompt: Prompt,
        n: int,
        *,
        sampling: Mapping[str, Any] | None = None,
        head: str | None = None,
        truncate: bool = False,
        return_token_ids: bool = False,
        append_to: str | None = None,
        early_rejection: Mapping[str, Any] | None = None,
        stop_when: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> AsyncIterator[Event]:
        """Draws `n` answers and gives each as soon as it is drawn and scored, in the end the ranking (`POST /rerank`
        with `stream`).

        Tried again only until the first event has come.

        Args:
            prompt: a text, or chat messages.
            n: how many to draw.
            sampling: how they are drawn: `temperature`, `top_p`, `top_k`, `max_tokens`, `seed`, ….
            head: by default the first hybrid head that is loaded, else another. A ranker's scores come with the
                ranking only.
            truncate: cut a prompt that is longer than the model takes.
            return_token_ids: give each answer's token ids as well.
            append_to: name of a stream to which best against worst is appended, for trainers that consume it.
            early_rejection: which answers are not drawn to their end: `keep` and `at`, or `max_loss`, and `head`. One
                worker draws all of them then, since they are compared.
            stop_when: when a guard ends an answer: `below`, `probability` or `fpr`, `head`, `pool`, `after`.
            timeout: seconds, also told to the service.

        Yields:
            A `Ranked` for each answer, then one `RerankAnswer`.

        Raises:
            InwardError: the service could not do its part, also in the middle.
        """
        call = calls.rerank(
            prompt, head=head, truncate=truncate, n=n, sampling=sampling, return_token_ids=return_token_ids or None,
            append_to=append_to, early_rejection=early_rejection, stop_when=stop_when, stream=True,
        )  # fmt: skip
        response = await self._persist(call, timeout, self._open)
        try:
            events = Events(response.headers.get("x-request-id"))
            async for line in response.aiter_lines():
                if (event := events.line(line)) is not None:
                    yield event
            events.end()
        except httpx.RequestError as error:
            raise no_answer(error, response.request) from error
        finally:
            await response.aclose()

    async def heads(self, *, timeout: float | None = None) -> list[HeadInfo]:
        """What is loaded (`GET /heads`)."""
        return await self._send(calls.heads(), timeout)

    async def head(self, name: str, *, timeout: float | None = None) -> HeadInfo:
        """One head: its versions, calibration and metrics at fitting (`GET /heads/{name}`)."""
        return await self._send(calls.head(name), timeout)

    async def activate(self, name: str, version: int, *, timeout: float | None = None) -> Head:
        """Switches a head to a version, or back to an earlier one (`POST /heads/{name}/activate`)."""
        return await self._send(calls.activate(name, version), timeout)

    async def update(
        self,
        name: str,
        sequence: int,
        pairs: Iterable[Element],
        *,
        lr: float | None = None,
        timeout: float | None = None,
    ) -> Head:
        """One online step of a hybrid head on labelled pairs (`POST /heads/{name}/update`).

        Args:
            name: of the head.
            sequence: one more than the head's last (`head(name).sequence`); a repeat of the last changes nothing.
            pairs: each with `prompt` (or `messages`), `chosen` and `rejected`.
            lr: learning rate of the step.
            timeout: seconds for one try.

        Raises:
            Conflict: `sequence` is neither the last one nor the next.
        """
        return await self._send(calls.update(name, sequence, pairs, lr), timeout)

    async def policy(self, *, timeout: float | None = None) -> Policy:
        """Which adapter the backbone carries, and which there are (`GET /policy`)."""
        return await self._send(calls.policy(), timeout)

    async def load_policy(self, version: str, *, timeout: float | None = None) -> Policy:
        """Puts an adapter of the policy on the backbone; "base" takes it off (`POST /policy`)."""
        return await self._send(calls.load_policy(version), timeout)

    async def sleep(self, *, timeout: float | None = None) -> bool:
        """Lends the service's GPU to somebody else, once what was begun is finished (`POST /sleep`). True: it sleeps.

        Raises:
            StatusError: 409 where its backbone does not sleep.
        """
        return await self._send(calls.sleep(), timeout)

    async def wake(self, *, timeout: float | None = None) -> bool:
        """Takes the GPU back (`POST /wake`). False: it is awake."""
        return await self._send(calls.wake(), timeout)

    async def create_job(
        self,
        kind: Literal["margin", "score", "reward"],
        rows: Iterable[Element],
        *,
        head: str | None = None,
        append_to: str | None = None,
        key: str | None = None,
        timeout: float | None = None,
    ) -> Job:
        """Uploads rows to be scored in their own time (`POST /jobs`); needs a service around a Redis.

        Args:
            kind: the route that each row goes through.
            rows: pairs, or items for `score`.
            head: as of that route.
            append_to: name of a stream to which scored rows are appended as well.
            key: an idempotency key; by default one of this call. Who keeps it and calls again, after an upload whose
                answer was lost, gets the same job.
            timeout: seconds for one try.
        """
        return await self._send(calls.create_job(kind, rows, head, append_to, key), timeout)

    async def job(self, id: str, *, timeout: float | None = None) -> Job:
        """How far a bulk job is (`GET /jobs/{id}`)."""
        return await self._send(calls.job(id), timeout)

    async def cancel_job(self, id: str, *, timeout: float | None = None) -> Job:
        """Stops a bulk job and drops what it did (`POST /jobs/{id}/cancel`)."""
        return await self._send(calls.cancel_job(id), timeout)

    async def job_results(self, id: str, *, timeout: float | None = None) -> list[dict[str, Any]]:
        """The results of a bulk job that is done, in the order of its rows (`GET /jobs/{id}/results`).

        Raises:
            Conflict: it is not done yet, or was cancelled.
        """
        return await self._send(calls.job_results(id), timeout)

    async def info(self, *, timeout: float | None = None) -> dict[str, Any]:
        """Model, versions and limits (`GET /info`)."""
        return await self._send(calls.info(), timeout)

    async def health(self, *, timeout: float | None = None) -> Health:
        """Whether requests are welcome (`GET /health`); asked once, without retries.

        Raises:
            ConnectionFailed: nobody answers.
        """
        try:
            return await self._try(calls.health(), self._core.request(self._http, calls.health(), timeout))
        except Unavailable as error:
            return Health(False, error.message)

    async def _send(self, call: Call[T], timeout: float | None) -> T:
        """Sends until there is an answer, or another try is not worth it."""
        return await self._persist(call, timeout, self._try)

    async def _try(self, call: Call[T], request: httpx.Request) -> T:
        try:
            response = await self._http.send(request)
        except httpx.RequestError as error:
            raise no_answer(error, request) from error
        return self._core.result(call, response)

    async def _open(self, call: Call[Any], request: httpx.Request) -> httpx.Response:
        """The beginning of an answer that comes as events; the caller closes it."""
        try:
            response = await self._http.send(request, stream=True)
            if response.is_success:
                return response
            await response.aread()
        except httpx.RequestError as error:
            raise no_answer(error, request) from error
        raise refusal(response)

    async def _persist(
        self, call: Call[Any], timeout: float | None, attempt: Callable[[Call[Any], httpx.Request], Awaitable[R]]
    ) -> R:
        """Makes the attempt again and again, with the same request, for as long as ``retries`` has it."""
        request = self._core.request(self._http, call, timeout)
        tries, failing_since = 0, None
        while True:
            tries += 1
            try:
                return await attempt(call, request)
            except InwardError as error:
                now = time.monotonic()
                failing_since = now if failing_since is None else failing_since
                pause = self._core.wait(error, tries, now - failing_since, call)
                if pause is None:
                    raise
            await asyncio.sleep(pause)

    async def _send_all(self, batches: Batches[A], timeout: float | None, progress: bool) -> A:
        """All parts, at most ``concurrency`` at once; what fails for all of them ends the call."""
        running: dict[asyncio.Task[A], Part] = {}
        with bar(progress, batches.total, batches.unit) as advance:
            try:
                while True:
                    for part in batches.take(self._core.concurrency - len(running)):
                        running[asyncio.create_task(self._send(batches.call(part), timeout))] = part
                    if not running:
                        return batches.whole()
                    done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        part = running.pop(task)
                        try:
                            advance(batches.answered(part, task.result()))
                        except StatusError as error:
                            advance(batches.failed(part, error))
            finally:
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)
