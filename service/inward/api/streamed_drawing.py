"""OpenAI's answers as server-sent events: how far the drawing is, then the best answers, then what it cost."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any

from inward.api.drawing import Given, ToDraw, best, usage
from inward.api.events import EventStream, data
from inward.api.services import Services
from inward.api.streamed_ranking import begin, candidate, successes, together
from inward.errors import InvalidField
from inward.intake import Coming
from inward.types import Scored
from inward.wire.openai import DrawRequest
from inward.wire.openai_answers import Progress, finish

Piece = Callable[[int, str | None, str | None], dict[str, Any]]
"""A choice of a chunk: its index, text to append, and why it ended."""


async def stream(
    services: Services, request: DrawRequest, wanted: ToDraw, about: dict[str, Any], piece: Piece
) -> EventStream:
    """Chunks as OpenAI's clients read them. With more than one answer drawn, empty ones come first that tell in the
    field ``inward`` how far the drawing is.

    Args:
        about: what every chunk has.

    Raises:
        InwardError: nothing has begun; what goes wrong later is an event of the error's shape.
    """
    if len(wanted.generations) > 1:
        raise InvalidField("several prompts can't be streamed; send them one by one", param="stream")
    outcomes = await begin(services, wanted.generations[0], (wanted.head.name,), wanted.deadline)
    chunks = _chunks(services, request, wanted, outcomes, about, piece)
    await anext(chunks)  # a generator that was never begun would not close ``outcomes`` when it is closed
    return EventStream(chunks)


async def _chunks(
    services: Services, request: DrawRequest, wanted: ToDraw, outcomes: Coming, about: dict[str, Any], piece: Piece
) -> AsyncGenerator[str, None]:
    (generation,) = wanted.generations
    with_usage = bool(request.stream_options and request.stream_options.include_usage)
    chunk = {**about, "usage": None} if with_usage else about
    drawn: dict[int, Scored] = {}
    top: float | None = None
    try:
        yield ""  # begun
        async for i, scored in successes(outcomes):
            drawn[i] = scored
            score = candidate(scored).score
            top = score if top is None or (score is not None and score > top) else top
            if request.drawn > 1:
                progress = Progress(drawn=len(drawn), of=request.drawn, best=top)
                yield data({**chunk, "choices": [piece(0, None, None)], "inward": progress.model_dump()})
    finally:
        await outcomes.aclose()
    found = await together(services, generation, [drawn[i] for i in range(len(drawn))], wanted.deadline)
    for index, given in enumerate(best(found, request.given)):
        yield data({**chunk, "choices": [piece(index, given.candidate.text, None)]})
        yield data({**chunk, "choices": [_end(piece, index, given)]})
    if with_usage:
        yield data({**about, "choices": [], "usage": usage(wanted, [found]).model_dump()})


def _end(piece: Piece, index: int, given: Given) -> dict[str, Any]:
    """The last piece of a choice, with what the head says of it."""
    ended = piece(index, None, finish(given.candidate.finish_reason))
    return {**ended, "inward": given.rating.model_dump()}
