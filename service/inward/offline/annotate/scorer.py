"""What annotates pairs: the model in this process, or a service at a URL. The numbers are the same."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol, TypeVar

import httpx

from inward import errors
from inward.errors import SetupError, Unavailable
from inward.heads.held_out import HeldOut
from inward.offline.annotate.options import AnnotateOptions
from inward.types import Floats
from inward_client import (
    AsyncInward,
    BadRequest,
    DeadlineExceeded,
    InvalidField,
    InwardError,
    Margin,
    NotFound,
    Retries,
    Score,
    ServerError,
    StatusError,
    TooLarge,
    Unauthorized,
    UnreadableAnswer,
)
from inward_client.frames import COLUMNS as COLUMNS
from inward_client.frames import PLACE
from inward_client.rows import Pair

PROBE = Pair("question", "answer", "another")
"""Scored once, to learn who scores."""
FIRST_CONTACT = Retries(patience=3.0)
"""A wrong address should be known at once."""
PATIENCE = Retries(patience=300.0, cap=30.0)
"""Afterwards a service may restart, or be overloaded for minutes."""
TIMEOUT_S = 600.0
"""Of one try of a request."""

PAIRS_WITH_TOKENS = 32
"""Of one request for the scores of all tokens, whose answer is large."""

AWAY = errors.ShardAway.code
A = TypeVar("A")
KEPT = "what is done is kept, so run the same again later"

Columns = dict[str, float | bool | None]
By = dict[str, Any]
"""Which versions of heads and policy gave some numbers: ``head``, ``policy_version``, ``confidence_head``."""


@dataclass(frozen=True, slots=True)
class Annotator:
    """Who annotates: the metadata of a file, and the same for all of its rows."""

    model: str
    revision: str
    fingerprint: str
    dtype: str
    policy_version: str
    template: str
    head: dict[str, Any]
    """Name, kind and version of the head that gives the margins."""
    confidence_head: dict[str, Any] | None
    """And of the one that gives the confidences."""
    inward: str
    """Version of the service."""
    held_out: HeldOut | None = None
    """How often the head agrees with held-out labels, where its manifest says so."""

    @classmethod
    def of(cls, info: Mapping[str, Any], by: By, fit: Mapping[str, Any]) -> Annotator:
        """From what ``/info`` says, from who scored a pair, and from how that head was fitted."""
        same = {name: info[name] for name in ("model", "revision", "fingerprint", "dtype", "template")}
        return cls(**same, **by, inward=info["version"], held_out=HeldOut.of(fit))


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Of both answers of a pair: the text of each token and the head's score at it."""

    chosen: Sequence[tuple[str, float]]
    rejected: Sequence[tuple[str, float]]


@dataclass(frozen=True, slots=True)
class Annotated:
    """One pair: its columns, or why there are none."""

    columns: Columns | None
    error: str | None = None
    truncated: bool = False
    tokens: int = field(default=0, compare=False)
    """Of its texts, or those of its neighbours too; known only while it is done."""


class Scorer(Protocol):
    """Annotates pairs."""

    @property
    def tokens(self) -> int | None:
        """Of one forward pass, where that is known: what the size of a chunk goes by."""
        ...

    async def annotator(self) -> Annotator:
        """Who annotates. Raises ``SetupError``: there is nobody, or not such a head."""
        ...

    async def annotate(self, pairs: Sequence[Pair]) -> tuple[list[Annotated], By | None]:
        """One result for each pair, in order, and who gave them (None: no pair was annotated)."""
        ...

    async def token_scores(self, pairs: Sequence[Pair]) -> Sequence[TokenScores | None]:
        """Of each pair the head's score at every token; None where it has none."""
        ...

    async def states(self, pairs: Sequence[Pair]) -> Floats:
        """Of each pair the mean state of both answers, ``[N, D]``. In this process only."""
        ...


OpenScorer = Callable[[], AbstractAsyncContextManager[Scorer]]
"""Opens one, here or in another process: it can be pickled."""


class ScoredRow(Protocol):
    """What the scoring of rows says of one (``api.rows.RowAnswer``)."""

    @property
    def by(self) -> By | None:
        """Who scored it; None where nobody could."""
        ...

    @property
    def tokens(self) -> int:
        """Of prompt and responses."""
        ...

    def body(self) -> Mapping[str, Any]:
        """As an element of ``margins``."""
        ...


@dataclass(frozen=True)
class RowScorer:
    """Scores in this process, as a row of a bulk job is scored."""

    score: Callable[[Sequence[Mapping[str, Any]]], Awaitable[Sequence[ScoredRow]]]
    info: Mapping[str, Any]
    tokens: int | None
    fit_of: Callable[[str], Mapping[str, Any]]
    """How the head of a name was fitted, as its manifest says."""
    tokens_of: Callable[[str, Sequence[Mapping[str, Any]]], Awaitable[Sequence[TokenScores | None]]]
    """The scores of a head at every token."""
    states_of: Callable[[Sequence[Pair]], Awaitable[Floats]]
    """The mean state of both answers."""

    async def annotator(self) -> Annotator:
        """See ``Scorer``."""
        try:
            (row,) = await self.score([PROBE.body()])
        except errors.InwardError as error:
            raise SetupError(f"the model can't annotate pairs: {error.message}") from None
        if row.by is None:
            raise SetupError(f"the model can't annotate pairs: {row.body()['error']['message']}")
        return Annotator.of(self.info, row.by, self.fit_of(row.by["head"]["name"]))

    async def annotate(self, pairs: Sequence[Pair]) -> tuple[list[Annotated], By | None]:
        """See ``Scorer``."""
        rows = await self.score([pair.body() for pair in pairs])
        by = next((row.by for row in reversed(rows) if row.by is not None), None)
        return [replace(_annotated(row.body()), tokens=row.tokens) for row in rows], by

    async def token_scores(self, pairs: Sequence[Pair]) -> Sequence[TokenScores | None]:
        """See ``Scorer``."""
        return await self.tokens_of((await self.annotator()).head["name"], [pair.body() for pair in pairs])

    async def states(self, pairs: Sequence[Pair]) -> Floats:
        """See ``Scorer``."""
        return await self.states_of(pairs)


class ServiceScorer:
    """Has a service annotate.

    Args:
        head: name of the head; None takes the service's only one.
        truncate: cut text that is longer than the model takes, instead of refusing the row.
        http: an httpx client to use instead of an own one.
    """

    tokens: int | None = None

    def __init__(
        self, url: str, key: str | None, *, head: str | None, truncate: bool, http: httpx.AsyncClient | None = None
    ) -> None:
        self._url, self._key, self._head, self._truncate, self._http = url, key, head, truncate, http
        self._client = self._inward(PATIENCE)
        self._confidence_head: dict[str, Any] | None = None

    def _inward(self, retries: Retries) -> AsyncInward:
        try:
            return AsyncInward(self._url, api_key=self._key or "", timeout=TIMEOUT_S, retries=retries, http=self._http)
        except ValueError as error:
            raise SetupError(f"--url: {error}") from None

    async def annotator(self) -> Annotator:
        """See ``Scorer``."""
        async with self._inward(FIRST_CONTACT) as client:
            try:
                info = await client.info()
                answer = await client.margin([PROBE.body()], head=self._head)
                if answer.margins[0].confidence is not None:
                    own = answer.head.kind == "hybrid"
                    hybrid = answer if own else await client.reward_pairs([PROBE.body()])
                    self._confidence_head = asdict(hybrid.head)
                fit = (await client.head(answer.head.name)).fit
            except InwardError as error:
                raise _refused(error) from None
        return Annotator.of(info, self._by(answer), fit)

    async def annotate(self, pairs: Sequence[Pair]) -> tuple[list[Annotated], By | None]:
        """See ``Scorer``. What the service refuses as a whole is asked in halves, so that a bad row harms itself only.

        Raises:
            SetupError: the service refuses us: no key, or no such head.
            Unavailable: it did not answer for minutes.
        """
        by: By | None = None

        async def ask(some: Sequence[Pair]) -> list[Annotated]:
            nonlocal by
            answer = await self._whole(
                lambda: self._client.margin([pair.body() for pair in some], head=self._head, truncate=self._truncate),
                lambda answer: answer.margins,
            )
            by = self._by(answer)
            tokens = answer.usage.prompt_tokens + answer.usage.completion_tokens
            one, *others = (_annotated(asdict(margin)) for margin in answer.margins)
            return [replace(one, tokens=tokens), *others]

        found = await _in_halves(pairs, ask, lambda error: Annotated(None, error.message)) if pairs else []
        return found, by

    async def token_scores(self, pairs: Sequence[Pair]) -> Sequence[TokenScores | None]:
        """See ``Scorer``. Raises as ``annotate``."""
        head = (await self.annotator()).head["name"] if pairs else ""

        async def ask(some: Sequence[Pair]) -> list[TokenScores | None]:
            items = [{"prompt": pair.prompt, "response": one} for pair in some for one in (pair.chosen, pair.rejected)]
            answer = await self._whole(
                lambda: self._client.score(items, head=head, detail=["tokens"], truncate=self._truncate),
                lambda answer: answer.scores,
            )
            answers = iter([_at_tokens(score) for score in answer.scores])
            both = zip(answers, answers, strict=True)
            return [TokenScores(chosen, rejected) if chosen and rejected else None for chosen, rejected in both]

        found: list[TokenScores | None] = []
        for start in range(0, len(pairs), PAIRS_WITH_TOKENS):
            found += await _in_halves(pairs[start : start + PAIRS_WITH_TOKENS], ask, lambda _: None)
        return found

    async def _whole(self, ask: Callable[[], Awaitable[A]], elements: Callable[[A], Sequence[Margin | Score]]) -> A:
        """Asks again while some elements wait for a part of the queue that is away, as long as for a whole one.

        Raises:
            Unavailable: it stayed away.
        """
        waited, pause = 0.0, PATIENCE.first
        while True:
            answer = await ask()
            lost = next((one.error for one in elements(answer) if one.error and one.error.code == AWAY), None)
            if lost is None:
                return answer
            if waited + pause > PATIENCE.patience:
                raise Unavailable(f"the service did not answer ({lost.message}); {KEPT}")
            await asyncio.sleep(pause)
            waited, pause = waited + pause, min(2 * pause, PATIENCE.cap)

    async def states(self, pairs: Sequence[Pair]) -> Floats:
        """See ``Scorer``: a service keeps its states."""
        raise SetupError("a service gives no states: annotate with the model in this process")

    def _by(self, answer: Any) -> By:
        return {
            "head": asdict(answer.head), "policy_version": answer.policy_version,
            "confidence_head": self._confidence_head,
        }  # fmt: skip

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.close()


@asynccontextmanager
async def at_url(options: AnnotateOptions, key: str | None) -> AsyncIterator[Scorer]:
    """The service of the options, as long as it is needed."""
    scorer = ServiceScorer(options.url or "", key, head=options.head, truncate=options.truncate)
    try:
        yield scorer
    finally:
        await scorer.close()


async def _in_halves(
    pairs: Sequence[Pair], ask: Callable[[Sequence[Pair]], Awaitable[list[A]]], refused: Callable[[StatusError], A]
) -> list[A]:
    """What the service answers; what it refuses or can't score as a whole is asked in halves, down to single pairs."""
    try:
        return await ask(pairs)
    except (InvalidField, TooLarge, BadRequest, DeadlineExceeded, ServerError) as error:
        if isinstance(error, ServerError) and not (isinstance(error, DeadlineExceeded) or error.of_one_element):
            raise _refused(error) from None
        if len(error.each) == len(pairs):
            return [refused(one) for one in error.each]
        if len(pairs) == 1:
            return [refused(error)]
        middle = len(pairs) // 2
        return [*await _in_halves(pairs[:middle], ask, refused), *await _in_halves(pairs[middle:], ask, refused)]
    except InwardError as error:
        raise _refused(error) from None


def _at_tokens(score: Score) -> list[tuple[str, float]]:
    """Of each token its text and its score; empty where there are none."""
    return list(zip(score.token_texts or (), score.tokens or (), strict=False))


def _annotated(margin: Mapping[str, Any]) -> Annotated:
    """From an element of ``margins``."""
    if margin["error"] is not None:
        return Annotated(None, PLACE.sub("", margin["error"]["message"]))
    columns = {name: margin.get("bin" if name == "margin_bin" else name) for name in COLUMNS}
    return Annotated(columns, truncated=margin["truncated"])


def _refused(error: InwardError) -> SetupError | Unavailable:
    """Why the service annotates nothing."""
    if isinstance(error, Unauthorized | NotFound | UnreadableAnswer):
        return SetupError(f"the service refuses the request: {error}")
    if isinstance(error, StatusError) and error.status < 429:
        return SetupError(f"the service can't annotate pairs: {error}")
    return Unavailable(f"the service did not answer ({error}); {KEPT}")
