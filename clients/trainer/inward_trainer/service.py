"""The service as the trainer uses it: ``inward_client``, waited for in a way that heeds signals, sent no more than the
backbone computes at once, and believed only where it answers with the policy that was asked for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

from inward_client import (
    Answer,
    AsyncInward,
    Conflict,
    DeadlineExceeded,
    HeadInfo,
    InvalidField,
    InwardError,
    Job,
    Margin,
    NotFound,
    RerankAnswer,
    Retries,
    RewardPair,
    ServerError,
    StatusError,
    TooLarge,
    event_loop,
)
from inward_trainer.errors import OptionsError, ServiceError, ServiceGone
from inward_trainer.pairs import Prompt, ScoredPair
from inward_trainer.progress import Progress, told
from inward_trainer.stopping import GRACE_S, Stopping

LOG = logging.getLogger(__name__)
T = TypeVar("T")
A = TypeVar("A", bound=Answer)

BASE = "base"
"""The policy without an adapter."""
POINTWISE = ("hybrid", "legend", "ensemble")
"""Kinds of heads whose score of an answer does not depend on other answers."""
MOST_SAMPLES = 64
"""That one request asks for, if the service does not say."""
SLICE = 64
"""Pairs or items in one request."""
SWITCHES = 5
"""How often the service is told which policy to carry, for one answer of it."""
TRANSFER_S = 30.0
"""What an answer may take beyond the service's own deadline."""
SEED_STRIDE = 0x9E3779B1
"""Between the seeds of the parts of one prompt's samples (the golden ratio of 2**32: no two parts meet)."""
PROMPT = ("prompt", "messages")
"""Fields of a draw that are refused for one prompt's sake; the others are refused whatever the prompt is."""
SHORTER = "fewer --samples, a smaller max_tokens in --sampling, a smaller --batch-size"


@dataclass(frozen=True, slots=True)
class Info:
    """What ``GET /info`` says of itself."""

    model: str
    revision: str
    path: str
    """Of the model's folder, on the service's machine; empty if it is not told."""
    fingerprint: str
    template: str
    deadline_s: float
    """Longest that the service works on one request."""
    most_samples: int
    """That one request may ask for."""
    concurrency: int
    """Requests that the backbones compute at once."""
    most_tokens: int | None = None
    """Of prompt and answer together; None if it is not told."""


@dataclass(frozen=True, slots=True)
class Draw:
    """What is to be drawn; ``place`` is the prompt's, for messages."""

    place: int
    prompt: Prompt
    seed: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer that the policy drew."""

    text: str
    score: float
    ids: tuple[int, ...] | None
    """As it was written, without what ended it."""
    finished: bool
    """Whether it ended by itself."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """The samples of one prompt, best first."""

    samples: tuple[Sample, ...]
    policy_version: str
    confidence: float | None
    """Of the first against the last; None where it was not told."""


class Service:
    """Waits are the main thread's. What may pass (a restart, overload) is waited for; everything asked is safe to ask
    again.

    Args:
        url: such as ``http://127.0.0.1:8080``.
        api_key: sent as Bearer.
        patience: seconds for which a service that does not answer is waited for.
        at_once: most requests in flight; the service's own number wins where it is smaller.
        stopping: ends waits.
        http: httpx's client, for tests.

    Raises:
        OptionsError: the URL is none.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        patience: float = 600.0,
        at_once: int = 8,
        stopping: Stopping | None = None,
        http: Any = None,
    ) -> None:
        self._stopping = stopping or Stopping()
        self._patience = patience
        self._options: dict[str, Any] = {
            "api_key": api_key, "retries": Retries(patience=patience, first=0.2), "batch_size": SLICE, "http": http,
        }  # fmt: skip
        self._url, self._at_once = url, at_once
        try:
            self._client = AsyncInward(url, concurrency=at_once, **self._options)
        except ValueError as error:
            raise OptionsError(f"--url: {error}") from None
        self._most_drawn = MOST_SAMPLES
        """Samples that one request asks for: as many as the service takes, or fewer where that took too long."""
        self.version: str | None = None
        """The policy that every answer must come from; None: whichever there is."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        event_loop.run(self._client.close())

    def info(self) -> Info:
        """Asks who it is, and keeps to what it says: its deadline, and how much it computes at once."""
        told = self._wait(self._client.info())
        limits = told.get("limits") or {}
        info = Info(
            model=str(told.get("model", "")),
            revision=str(told.get("revision") or ""),
            path=str(told.get("path") or ""),
            fingerprint=str(told.get("fingerprint", "")),
            template=str(told.get("template", "")),
            deadline_s=float(limits.get("timeout_seconds", 100.0)),
            most_samples=int(limits.get("candidates", MOST_SAMPLES)),
            concurrency=max(1, int(told.get("concurrency", self._at_once))),
            most_tokens=limits.get("tokens"),
        )
        self._at_once, self._most_drawn = min(self._at_once, info.concurrency), info.most_samples
        event_loop.run(self._client.close())
        self._client = AsyncInward(
            self._url, concurrency=self._at_once, timeout=info.deadline_s + TRANSFER_S, **self._options
        )
        return info

    def draw(
        self,
        draws: Sequence[Draw],
        n: int,
        sampling: Mapping[str, Any],
        head: str,
        early_rejection: Mapping[str, Any] | None = None,
    ) -> list[Drawn | None]:
        """N samples of each, of the policy as it is in the service now; None where fewer than one could be scored, or
        the service refuses the prompt (the log says why).

        A request that takes longer than the service allows is drawn in parts from then on. Samples that
        ``early_rejection`` did not let come to their end are left out.

        Raises:
            ServiceError: one sample takes longer than the service allows, or it refuses an option.
        """
        options = {"sampling": sampling, "head": head, "early_rejection": early_rejection or None}

        async def all_of_them() -> list[Drawn | None]:
            turns = asyncio.Semaphore(self._at_once)
            async with told("sampling", n * len(draws), SHORTER) as progress:
                jobs = [self._draw(draw, n, options, turns, progress) for draw in draws]
                return await _together(jobs)

        return self._wait(all_of_them())

    def rewards(self, pairs: Sequence[ScoredPair], head: str | None = None) -> list[tuple[RewardPair, str]]:
        """What the hybrid head says of each pair, or its ``error``; and the policy's version."""
        answer = self._scored("pairs", len(pairs), lambda: self._client.reward_pairs(_texts(pairs), head=head))
        if answer is None:
            return [(RewardPair(), "")] * len(pairs)
        return [(reward, answer.policy_version) for reward in answer.rewards]

    def scores(self, items: Sequence[tuple[Prompt, str]], head: str) -> list[float | None]:
        """Any pointwise head's score of each prompt and response; None where it has none."""
        asked = [{"prompt": prompt, "response": response} for prompt, response in items]
        answer = self._scored("items", len(items), lambda: self._client.score(asked, head=head))
        return [None] * len(items) if answer is None else [score.score for score in answer.scores]

    def both_scores(self, pairs: Sequence[ScoredPair], head: str) -> list[tuple[float | None, float | None]]:
        """The same of the chosen and the rejected answer of each pair."""
        items = [(pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
        scores = self.scores(items, head)
        return list(zip(scores[::2], scores[1::2], strict=True))

    def margins(self, pairs: Sequence[ScoredPair], head: str | None = None) -> list[Margin]:
        """What the LEGEND head says of each pair; an ``error`` where it can't be scored."""
        answer = self._scored("pairs", len(pairs), lambda: self._client.margin(_texts(pairs), head=head))
        return [Margin()] * len(pairs) if answer is None else answer.margins

    def find_head(self, name: str | None, option: str, kinds: Sequence[str] = ("hybrid",)) -> HeadInfo:
        """The head of this name, or the first one of these kinds: as the service's own routes choose.

        Raises:
            OptionsError: there is none.
        """
        loaded = self._wait(self._client.heads())
        found = next((head for head in loaded if head.kind in kinds and name in (None, head.name)), None)
        if found is None:
            there = ", ".join(f"{head.name} ({head.kind})" for head in loaded) or "none"
            wanted = f"no head {name!r} of kind" if name else "no head of kind"
            raise OptionsError(f"{option}: the service has {wanted} {' or '.join(kinds)}; it has: {there}")
        return found

    def update_head(self, name: str, sequence: int, pairs: Sequence[ScoredPair], lr: float) -> bool:
        """One online step of a head, on states of the current policy, applied once however often it is sent.

        Returns:
            Whether it was applied now or by the same call before; False if a later one was, so that this one must have
            been, too.
        """

        async def ask() -> bool:
            if sequence < int((await self._client.head(name)).sequence or 0):
                return False
            await self._carry()
            await self._client.update(name, sequence, _texts(pairs), lr=lr)
            return True

        return self._wait(ask(), GRACE_S)

    def load_policy(self, version: str) -> None:
        """Makes the service sample and score with an adapter of its folder (nothing happens if it does already), and
        believes no answer of another one from now on.
        """
        self.version = version
        self._wait(self._carry(), GRACE_S)

    def finds_adapter(self, version: str) -> bool:
        """Whether its folder of adapters has one of this name, which it may refuse to load.

        Raises:
            OptionsError: it has no folder of adapters.
        """
        try:
            self._wait(self._client.load_policy(version))
        except ServiceError as error:
            if isinstance(error.__cause__, Conflict):
                raise OptionsError(f"--adapters: the service can load nothing: {error.__cause__.message}") from None
            if not isinstance(error.__cause__, InvalidField | NotFound):
                raise
            return isinstance(error.__cause__, InvalidField)
        return True

    def sleep(self) -> None:
        """Has it lend its device, until ``wake``."""
        self._wait(self._client.sleep(), GRACE_S)

    def wake(self) -> None:
        """Has it take its device back; nothing happens if it is awake."""
        self._wait(self._client.wake(), GRACE_S)

    def create_job(self, pairs: Sequence[ScoredPair], key: str, head: str | None = None) -> str:
        """Uploads pairs as a bulk job of kind ``reward``; gives its id. The same ``key`` makes the same job."""
        return self._wait(self._client.create_job("reward", _texts(pairs), head=head, key=key)).id

    def job(self, id: str) -> Job:
        """How far a bulk job is."""
        return self._wait(self._client.job(id))

    def job_results(self, id: str) -> list[dict[str, Any]]:
        """Its results in the order of the rows."""
        return self._wait(self._client.job_results(id))

    async def _draw(
        self, draw: Draw, n: int, options: Mapping[str, Any], turns: asyncio.Semaphore, progress: Progress
    ) -> Drawn | None:
        """All samples of one prompt, in as many parts as it takes; ``options`` are those of ``Inward.rerank``."""
        parts: list[RerankAnswer] = []
        start = 0
        try:
            while start < n:
                async with turns:
                    most = min(n - start, self._most_drawn)
                    answer = await self._part(draw, start, most, options)
                if answer is not None:
                    parts.append(answer)
                    start += most
                    progress.done += most
                    progress.tokens += sum(ranked.completion_tokens or 0 for ranked in answer.results)
        except (TooLarge, InvalidField) as error:
            if not _of_the_prompt(error):
                raise
            progress.done += n - start
            LOG.warning("prompt %d is left out: %s", draw.place, error)
            return None
        return _ranked(parts)

    async def _part(self, draw: Draw, start: int, most: int, options: Mapping[str, Any]) -> RerankAnswer | None:
        """Samples ``start`` to ``start + most``; None where that took too long and fewer are to be asked for."""
        seeded = {**options["sampling"], "seed": (draw.seed + SEED_STRIDE * start) % 2**32}
        asked = {**options, "sampling": seeded, "n": most, "return_token_ids": True}
        try:
            return await self._current(lambda: self._client.rerank(draw.prompt, **asked))
        except DeadlineExceeded as error:
            if most == 1:
                raise ServiceError(
                    f"one sample takes longer than the service allows ({error.message}): give a smaller max_tokens in "
                    "--sampling, or serve with a longer --timeout",
                    error.status,
                ) from None
            self._most_drawn = min(self._most_drawn, (most + 1) // 2)
            LOG.info("%d samples at once take longer than the service allows: %d from now on", most, self._most_drawn)
            return None

    async def _current(self, ask: Callable[[], Awaitable[A]]) -> A:
        """An answer of the policy that is wanted; a service that has lost it, by a restart, is told again."""
        for _ in range(SWITCHES):
            answer = await ask()
            if self.version in (None, answer.policy_version):
                return answer
            LOG.warning("the answer is of policy %s, not of %s: asked again", answer.policy_version, self.version)
            await self._carry()
        raise ServiceError(
            f"the service leaves policy {self.version} again and again: who else switches it? A service serves one run"
        )

    async def _carry(self) -> None:
        if self.version is not None and (await self._client.policy()).policy_version != self.version:
            await self._client.load_policy(self.version)

    def _scored(self, sent_as: str, count: int, ask: Callable[[], Awaitable[A]]) -> A | None:
        """The answer to a list of so many pairs or items; None where it is that not one of them can be scored."""

        async def asking() -> A:
            async with told("scoring answers" if sent_as == "items" else f"scoring {sent_as}", count):
                return await self._current(ask)

        try:
            return self._wait(asking())
        except ServiceError as error:
            cause = error.__cause__
            if not isinstance(cause, InvalidField | TooLarge | ServerError):
                raise
            away = isinstance(cause, ServerError) and not cause.of_one_element
            if away or not (cause.param or "").startswith(f"{sent_as}."):
                raise
            return None

    def _wait(self, coroutine: Coroutine[Any, Any, T], grace_s: float = 0.0) -> T:
        try:
            return self._stopping.wait(coroutine, grace_s)
        except StatusError as error:
            kind = ServiceGone if error.status in (429, 502, 503, 504) else ServiceError
            raise kind(f"the service refuses: {error}", error.status) from error
        except InwardError as error:
            raise ServiceGone(f"no answer from the service for {self._patience:.0f} s: {error}") from error


async def _together(jobs: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order; the first failure cancels the others."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(job) for job in jobs]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


def _of_the_prompt(error: StatusError) -> bool:
    """Whether a draw was refused for its prompt's sake, and not for an option's."""
    field = (error.param or "").partition(".")[0]
    too_long = isinstance(error, TooLarge) and error.param in (None, "sampling.max_tokens")
    return field in PROMPT or too_long


def _ranked(parts: Sequence[RerankAnswer]) -> Drawn | None:
    """The samples of all parts; a head that judges one answer at a time judges them alike in any of them."""
    usable = [
        Sample(one.text, one.score, tuple(one.token_ids) if one.token_ids else None, one.finish_reason != "length")
        for part in parts
        for one in part.results
        if one.score is not None and one.text is not None and one.finish_reason not in ("rejected", "guard")
    ]
    versions = {part.policy_version for part in parts}
    if not usable or len(versions) > 1:
        return None
    pair = parts[0].pair if len(parts) == 1 else None
    samples = tuple(sorted(usable, key=lambda sample: -sample.score))
    return Drawn(samples, parts[-1].policy_version, pair.confidence if pair else None)


def _texts(pairs: Sequence[ScoredPair]) -> list[dict[str, Any]]:
    return [pair.texts() for pair in pairs]
