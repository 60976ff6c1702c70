"""Rows for trainers: what a request wants appended to a stream beside its answer, in the shape of bulk jobs' rows."""

from __future__ import annotations

from inward.api.services import ScoredRows, Services
from inward.errors import Conflict
from inward.wire import RerankAnswer


def stream(services: Services, name: str | None) -> ScoredRows | None:
    """Where rows go, if the request wants that; asked before anything is computed.

    Raises:
        Conflict: this server keeps no streams.
    """
    if name is None:
        return None
    if services.scores is None:
        raise Conflict(
            "append_to needs a Redis that keeps streams: run `inward api` and `inward worker` around a --redis-url",
            param="append_to",
        )
    return services.scores


async def append_pair(rows: ScoredRows | None, name: str | None, answer: RerankAnswer) -> None:
    """Appends the pair of an answer, if it has one.

    Raises:
        Unavailable: it could not be appended; who asks again has it appended at least once.
    """
    if rows is None or name is None or answer.pair is None:
        return
    named = answer.model_dump(mode="json", include={"head", "policy_version"})
    await rows.append(name, [{**answer.pair.model_dump(mode="json"), **named}])
