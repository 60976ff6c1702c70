"""What the routes stand on. ``processes`` fills it; the routes know nothing else of the service."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol

from fastapi import Depends, Request

from inward.api.keys import KeyRing
from inward.intake import Intake
from inward.prompts import Prompts, Texts
from inward.stores.idempotency import IdempotencyStore, MemoryIdempotencyStore
from inward.stores.quota import MemoryQuota, Quota
from inward.types import HeadRef, Kind


class BulkJobs(Protocol):
    """Jobs that outlive a request. Every method raises ``Unavailable`` where their store can't be reached."""

    async def create(
        self, kind: str, lines: AsyncIterable[str], *, head: str | None, scores: str | None, caller: str | None
    ) -> BulkJob:
        """Stores the rows, one JSON object a line, as they come, and begins when the last one is there. Raises
        ``InvalidField`` for none.

        What ``lines`` raises is passed on, and leaves nothing behind.
        """
        ...

    async def get(self, job_id: str) -> BulkJob:
        """How far it is. Raises ``NotFound``."""
        ...

    async def cancel(self, job_id: str) -> BulkJob:
        """Nothing more of it is computed. Raises ``NotFound``."""
        ...

    def results(self, job_id: str) -> AsyncIterator[str]:
        """Of a job that is done: one line a row, in their order."""
        ...


class BulkJob(Protocol):
    """What is known of a bulk job."""

    @property
    def state(self) -> str:
        """``running``, ``done`` or ``cancelled``."""
        ...

    def body(self) -> dict[str, Any]:
        """As JSON."""
        ...


class ScoredRows(Protocol):
    """Streams of scored rows, which trainers consume."""

    async def append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends to the stream ``name``. Raises ``Unavailable``."""
        ...


class HeadControl(Protocol):
    """Where heads are looked up, switched and updated. Every method raises ``NotFound`` for a head or version that
    isn't loaded.
    """

    async def refresh(self) -> None:
        """Looks anew, where what is known may be of a moment ago. Raises ``Unavailable``."""
        ...

    def resolve(self, name: str | None, kinds: Sequence[Kind]) -> HeadRef:
        """The active version of ``name``, or of the first head of the first of ``kinds`` that is loaded."""
        ...

    def listing(self) -> list[dict[str, Any]]:
        """All heads."""
        ...

    def show(self, name: str) -> dict[str, Any]:
        """One head: versions, fingerprint, calibration, metrics at fitting."""
        ...

    async def activate(self, name: str, version: int) -> HeadRef:
        """Switches to a version for all batches that begin from now on."""
        ...

    async def update(self, name: str, sequence: int, pairs: Sequence[Texts], *, lr: float) -> HeadRef:
        """One online step on pairs (chosen first); a repeat of the last ``sequence`` changes nothing.

        Raises:
            Conflict: ``sequence`` is neither the last one nor the next.
            InvalidField: a pair can't be used, or this kind of head isn't updated online.
        """
        ...


class PolicyControl(Protocol):
    """Where the policy that the backbone carries is looked up and switched."""

    async def show(self) -> dict[str, Any]:
        """What is carried, what was, and what could be."""
        ...

    async def switch(self, version: str) -> dict[str, Any]:
        """Carries ``version`` for all batches that begin from now on, and tells what ``show`` does.

        Raises:
            InvalidField: the adapter can't be used; the former version stays.
            NotFound: there is no such version.
            Conflict: there is no folder of adapters.
        """
        ...


class SleepControl(Protocol):
    """Where the backbone is told to lend its device to somebody else."""

    @property
    def asleep(self) -> bool: ...

    async def sleep(self) -> None:
        """Raises ``Conflict`` where it can't."""
        ...

    async def wake(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may ask for."""

    body_bytes: int = 8 * 2**20
    upload_bytes: int = 256 * 2**20
    """Of a bulk job."""
    body_s: float = 60.0
    """Seconds in which a body must have come."""
    items: int = 4096
    """Items or pairs."""
    candidates: int = 256
    """Answers to one prompt."""
    timeout_s: float = 95.0


@dataclass(frozen=True, slots=True)
class Services:
    """Everything that the routes use."""

    prompts: Prompts
    intake: Intake
    heads: HeadControl
    policies: PolicyControl
    model: str
    """Name of the backbone, which every answer gives: known whether or not a worker is heard of just now."""
    info: Callable[[], Mapping[str, Any]]
    """What ``GET /info`` answers."""
    ready: Callable[[], tuple[bool, str]]
    """Whether requests are welcome, and if not, why."""
    alive: Callable[[], bool]
    """Whether the backbone can compute."""
    limits: Limits = Limits()
    keys: KeyRing = field(default_factory=KeyRing)
    """Who is let in; none: everybody."""
    metrics_open: bool = True
    """``/metrics`` needs no key."""
    sleeper: SleepControl | None = None
    """None where the backbone is in other processes."""
    rerank_head: str | None = None
    """Head that ranks, where the request names none."""
    compat_head: str | None = None
    """Head that answers on other projects' routes, where the request names none."""
    guard_head: str | None = None
    """Head that judges for LiteLLM, where its configuration names none."""
    false_positives: float = 0.01
    """Share of acceptable texts that heads as judges may flag by mistake, where a request does not say."""
    jobs: BulkJobs | None = None
    """Bulk jobs, where there is a Redis to keep them."""
    scores: ScoredRows | None = None
    """Streams for trainers, where there is a Redis to keep them."""
    quota: Quota | None = field(default_factory=MemoryQuota)
    """Counts what each key had computed; None where nobody is to be stopped."""
    tokens_a_minute: int | None = None
    """That each key may have computed, where it has no number of its own; None: as many as it likes."""
    idempotency: IdempotencyStore = field(default_factory=lambda: MemoryIdempotencyStore(keep=3600.0, running=120.0))
    """Answers under an ``Idempotency-Key``."""


async def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


FromApp = Annotated[Services, Depends(_services)]
"""Type of a route's parameter that receives the services."""
