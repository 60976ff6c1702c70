"""OpenAI's answers as server-sent events: a single one while it is drawn; of several first how far the drawing is, then
the best; and in the end what it cost.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from inward.api.candidates import Candidate, Candidates
from inward.api.drawing import Given, ToDraw, best, usage
from inward.api.events import EventStream, data
from inward.api.scoring import charge
from inward.api.services import Services
from inward.api.streamed_ranking import begin, together
from inward.errors import InvalidField
from inward.types import Group
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
    chunks = _Chunks(request, wanted, about, piece)
    events = _text(services, chunks) if request.drawn == 1 else _best(services, chunks)
    await anext(events)
    return EventStream(events)


@dataclass(frozen=True, slots=True)
class _Chunks:
    """What a stream tells, as its client reads it."""

    request: DrawRequest
    wanted: ToDraw
    about: dict[str, Any]
    piece: Piece

    @property
    def tells_usage(self) -> bool:
        """In the last chunk; then all others have a null in its place."""
        options = self.request.stream_options
        return options is not None and bool(options.include_usage)

    def chunk(self, choice: dict[str, Any], **more: Any) -> str:
        usage = {"usage": None} if self.tells_usage else {}
        return data({**self.about, **usage, "choices": [choice], **more})

    def progress(self, progress: Progress) -> str:
        return self.chunk(self.piece(0, None, None), inward=progress.model_dump())

    def end(self, index: int, given: Given) -> str:
        """The last piece of a choice, with what the head says of it."""
        ended = self.piece(index, None, finish(given.candidate.finish_reason))
        return self.chunk({**ended, "inward": given.rating.model_dump()})

    def usage(self, found: Candidates) -> Iterator[str]:
        if self.tells_usage:
            yield data({**self.about, "choices": [], "usage": usage(self.wanted, [found]).model_dump()})


async def _text(services: Services, chunks: _Chunks) -> AsyncGenerator[str, None]:
    """The one answer, while it is drawn."""
    wanted, begun = chunks.wanted, False
    (generation,) = wanted.generations
    group = Group(generation.prompt_ids, sampling=generation.spec)
    async with charge(services, [group]):
        text = await services.intake.tell(group, heads=(wanted.head.name,), timeout=wanted.deadline.left)
    async with aclosing(text):
        yield ""  # admitted; a generator that was never begun would not close what comes when it is closed
        async for part in text:
            yield chunks.chunk(chunks.piece(0, part, None, begun=begun))
            begun = True
    assert text.scored is not None
    found = await together(services, generation, [text.scored], wanted.deadline)
    (given,) = best(found, 1)
    if not begun:
        yield chunks.chunk(chunks.piece(0, "", None))
    yield chunks.end(0, given)
    for last in chunks.usage(found):
        yield last


async def _best(services: Services, chunks: _Chunks) -> AsyncGenerator[str, None]:
    """How far the drawing is, then the winners."""
    wanted = chunks.wanted
    (generation,) = wanted.generations
    progress = Progress(drawn=0, of=chunks.request.drawn, best=None)
    async with aclosing(await begin(services, generation, (wanted.head.name,), wanted.deadline)) as drawing:
        yield ""  # admitted, as above
        async with aclosing(drawing.answers()) as answers:
            async for _, answer in answers:
                progress = _further(progress, answer)
                yield chunks.progress(progress)
    found = await drawing.whole()
    for index, given in enumerate(best(found, chunks.request.given)):
        yield chunks.chunk(chunks.piece(index, given.candidate.text, None))
        yield chunks.end(index, given)
    for last in chunks.usage(found):
        yield last


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
