"""What the service says of itself, its heads and its bulk jobs. Newer versions may say more."""

from __future__ import annotations

from typing import Any, Literal

from inward.types import Kind, Position
from inward.wire.base import Lenient


class FittedOn(Lenient):
    """A backbone."""

    name: str
    revision: str
    fingerprint: str


class HeadInfo(Lenient):
    """A loaded head."""

    name: str
    kind: Kind
    version: int
    """The active one."""
    versions: list[int]
    sequence: int | None
    """Number of the last online step."""
    path: str | None
    created: str
    """UTC, ISO 8601."""
    backbone: FittedOn
    layers: list[int]
    """Index k is the residual stream after k blocks."""
    position: Position
    pool: dict[str, Any] | None
    """How the scores of a response's tokens make its score, with `name`; null: the score at `position` is its score."""
    template: str
    """What turned a conversation into text at fitting."""
    calibration: dict[str, Any]
    fit: dict[str, Any]
    """Data hash, seed and metrics."""


class HeadsAnswer(Lenient):
    """Answer of `/heads`."""

    heads: list[HeadInfo]


class RequestLimits(Lenient):
    """What one request may ask for."""

    body_bytes: int
    items: int
    candidates: int
    tokens: int
    """Of one prompt and response."""
    timeout_seconds: float
    queue_tokens: int
    """Tokens that may wait and be computed at once."""


class Info(Lenient):
    """Answer of `/info`."""

    version: str
    """Of the service."""
    model: str
    revision: str
    path: str
    """Of the model's folder, on the machine that computes."""
    fingerprint: str
    concurrency: int
    """Requests that are computed at once; more wait."""
    policy_version: str
    dtype: str
    device: str
    layers: int
    width: int
    template: str
    heads: list[str]
    jobs: bool = False
    """Whether bulk jobs are kept here."""
    limits: RequestLimits


class Status(Lenient):
    """Answer of the health routes, where all is well."""

    status: str


class SleepAnswer(Lenient):
    """Answer of `/sleep` and `/wake`."""

    asleep: bool


class JobStatus(Lenient):
    """A bulk job."""

    id: str
    state: Literal["running", "done", "cancelled"]
    kind: Literal["margin", "score", "reward"]
    rows: int
    done: int
    """Rows that are worked off."""
    created: float
    """Unix time."""
    head: str | None
    scores: str | None
    """Name of the stream to which scored rows are appended as well."""
