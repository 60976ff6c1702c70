"""OpenAI's answers as server-sent events: a single one while it is drawn; of several first how far the drawing is, then
the best; and in the end what it cost.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any, Protocol

from inward.api.candidates import Candidate, Candidates
from inward.api.drawing import Given, ToDraw, best, usage
from inward.api.events import EventStream, data
from inward.api.services import Services
from inward.api.streamed_ranking import (
    begin,
    begin_group,
    begin_text,
    candidate,
    ended,
    successes,
    together,
    together_only,
)
from inward.errors import InvalidField
from inward.intake import Coming, ComingSamples, ComingText
from inward.types import Scored
from inward.wire.openai import DrawRequest
from inward.wire.openai_answers import Progress, finish


class Piece(Protocol):
    """Makes a choice of a chunk."""

    def __call__(self, index: int, text: str | None, ended: str | None, *, begun: bool = False) -> dict[str, Any]:
        """Args:
        index: of the choice.
        text: to append.
        ended: why it ended.
        begun: whether a chunk with text of this choice came before.
        """
        ...


async def stream(
    services: Services, request: DrawRequest, wanted: ToDraw, about: dict[str, Any], piece: Piece
) -> EventStream:
    """Chunks as OpenAI's clients read them: with one answer drawn its text while it is drawn. With more than one, empty
    ones come first that tell in the field ``inward`` how far the drawing is.

    Args:
        about: what every chunk has.

    Raises:
        InwardError: nothing has begun; what goes wrong later is an event of the error's shape.
    """
    if len(wanted.generations) > 1:
        raise InvalidField("several prompts can't be streamed; send them one by one", param="stream")
    (generation,), heads = wanted.generations, (wanted.head.name,)
    if request.drawn == 1:
        text = await begin_text(services, generation, heads, wanted.deadline)
        chunks = _told(services, request, wanted, text, about, piece)
    elif together_only(generation):
        samples = await begin_group(services, generation, heads, wanted.deadline)
        chunks = _compared(request, wanted, samples, about, piece)
    else:
        outcomes = await begin(services, generation, heads, wanted.deadline)
        chunks = _chosen(services, request, wanted, outcomes, about, piece)
    await anext(chunks)  # a generator that was never begun would not close what comes when it is closed
    return EventStream(chunks)


async def _told(
    services: Services, request: DrawRequest, wanted: ToDraw, text: ComingText, about: dict[str, Any], piece: Piece
) -> AsyncGenerator[str, None]:
    chunk, begun = _chunk(request, about), False
    try:
        yield ""  # begun
        async for part in text:
            yield data({**chunk, "choices": [piece(0, part, None, begun=begun)]})
            begun = True
    finally:
        await text.aclose()
    assert text.scored is not None
    found = await together(services, wanted.generations[0], [text.scored], wanted.deadline)
    (given,) = best(found, 1)
    if not begun:
        yield data({**chunk, "choices": [piece(0, "", None)]})
    yield data({**chunk, "choices": [_end(piece, 0, given)]})
    if chunk is not about:
        yield _usage(wanted, found, about)


async def _chosen(
    services: Services, request: DrawRequest, wanted: ToDraw, outcomes: Coming, about: dict[str, Any], piece: Piece
) -> AsyncGenerator[str, None]:
    """Answers of which each is a job of its own."""
    (generation,) = wanted.generations
    drawn: dict[int, Scored] = {}
    progress = Progress(drawn=0, of=request.drawn, best=None)
    try:
        yield ""  # begun
        async for i, scored in successes(outcomes):
            drawn[i] = scored
            progress = _further(progress, generation.counted(candidate(scored)))
            yield _progress(request, progress, about, piece)
    finally:
        await outcomes.aclose()
    in_order = [drawn[i] for i in range(len(drawn))]
    found = await together(services, generation, in_order, wanted.deadline)
    for told in _winners(request, wanted, found, about, piece):
        yield told


async def _compared(
    request: DrawRequest, wanted: ToDraw, samples: ComingSamples, about: dict[str, Any], piece: Piece
) -> AsyncGenerator[str, None]:
    """Answers that are one job, since they are compared while they are drawn."""
    (generation,) = wanted.generations
    progress = Progress(drawn=0, of=request.drawn, best=None)
    try:
        yield ""  # begun
        async with aclosing(ended(generation, samples)) as answers:
            async for _, answer in answers:
                progress = _further(progress, answer)
                yield _progress(request, progress, about, piece)
    finally:
        await samples.aclose()
    assert samples.scored is not None
    for told in _winners(request, wanted, generation.found(samples.scored), about, piece):
        yield told


def _further(before: Progress, answer: Candidate) -> Progress:
    """How far the drawing is with one answer more."""
    score = answer.score if answer.finished else None
    best = before.best if score is None or (before.best is not None and before.best > score) else score
    return Progress(
        drawn=before.drawn + 1,
        of=before.of,
        rejected=before.rejected + (answer.finish_reason == "rejected"),
        not_drawn_tokens=before.not_drawn_tokens + (answer.not_drawn or 0),
        best=best,
    )


def _progress(request: DrawRequest, progress: Progress, about: dict[str, Any], piece: Piece) -> str:
    return data({**_chunk(request, about), "choices": [piece(0, None, None)], "inward": progress.model_dump()})


def _winners(
    request: DrawRequest, wanted: ToDraw, found: Candidates, about: dict[str, Any], piece: Piece
) -> Iterator[str]:
    chunk = _chunk(request, about)
    for index, given in enumerate(best(found, request.given)):
        yield data({**chunk, "choices": [piece(index, given.candidate.text, None)]})
        yield data({**chunk, "choices": [_end(piece, index, given)]})
    if chunk is not about:
        yield _usage(wanted, found, about)


def _chunk(request: DrawRequest, about: dict[str, Any]) -> dict[str, Any]:
    """What every chunk but the last has, where that tells the usage."""
    return {**about, "usage": None} if request.stream_options and request.stream_options.include_usage else about


def _usage(wanted: ToDraw, found: Candidates, about: dict[str, Any]) -> str:
    return data({**about, "choices": [], "usage": usage(wanted, [found]).model_dump()})


def _end(piece: Piece, index: int, given: Given) -> dict[str, Any]:
    """The last piece of a choice, with what the head says of it."""
    ended = piece(index, None, finish(given.candidate.finish_reason))
    return {**ended, "inward": given.rating.model_dump()}
