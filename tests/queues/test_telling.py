"""The text of an answer while it is drawn, from the backbone's tokens to who waits for it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from inward import metrics
from inward.errors import DeadlineExceeded, InternalError, Unavailable
from inward.intake import Intake
from inward.queues.memory import MemoryQueue
from inward.queues.telling import Telling, TellingEnds
from inward.types import Ended, Failed, Group, HeadRef, Piece, Sample, SamplingSpec, Scored, Scores, StopRule, Usage
from support.corridor import corridor
from support.waiting import PATIENCE

SPEC = SamplingSpec(1, max_tokens=40, seed=4)
DRAWING = Group((1, 2, 3), sampling=SPEC)


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr("inward.queues.telling.TELL_INTERVAL_S", 0.0)


async def told(c, group=DRAWING, heads=("plain",)):
    text = await c.intake.tell(group, heads=heads, timeout=PATIENCE)
    return [part async for part in text], text.scored


async def test_the_parts_are_the_text_and_come_while_it_is_drawn(at_once):
    before = metrics.REGISTRY.get_sample_value("inward_time_to_first_token_seconds_count")
    async with corridor() as c:
        [whole] = await c.score([DRAWING])
        assert not c.queue._hear
        parts, scored = await told(c)
    assert "".join(parts) == whole.samples[0].text
    assert len(parts) > 5
    assert scored.samples == whole.samples
    assert scored.scores == whole.scores
    assert not c.queue._hear
    assert metrics.REGISTRY.get_sample_value("inward_time_to_first_token_seconds_count") == before + 1


async def test_pieces_that_come_too_fast_are_one(monkeypatch):
    monkeypatch.setattr("inward.queues.telling.TELL_INTERVAL_S", PATIENCE)
    async with corridor() as c:
        parts, scored = await told(c)
    assert len(parts) == 2
    assert "".join(parts) == scored.samples[0].text


async def test_nothing_is_told_where_several_are_drawn_or_nobody_asks(at_once, monkeypatch):
    pieces = []

    async def tell(self, piece):
        pieces.append(piece)
        return True

    monkeypatch.setattr(MemoryQueue, "tell", tell)
    async with corridor() as c:
        await c.score([DRAWING, Group((1, 2), sampling=SamplingSpec(3, max_tokens=9, seed=1))])
    assert pieces == []


async def test_a_guarded_answer_is_told_no_further_than_it_is_given(at_once):
    """Whatever the threshold: what is told is what the answer begins with, and no token after the last safe one."""
    async with corridor() as c:
        [whole] = await c.score([DRAWING], details=frozenset({"tokens"}))
        scores = np.array(whole.scores[0].tokens_N[0])
        ended = 0
        for below in np.quantile(scores, [0.0, 0.05, 0.2, 0.5, 0.9]):
            rule = StopRule("plain", below=float(below) + 1e-6, pool="last")
            guarded = SamplingSpec(1, max_tokens=40, seed=4, stop_when=rule)
            parts, scored = await told(c, Group((1, 2, 3), sampling=guarded))
            (sample,) = scored.samples
            assert "".join(parts) == sample.text
            assert sample.finish_reason == "guard"
            assert len(sample.ids) == int(np.flatnonzero(scores < below + 1e-6)[0])
            ended += len(parts) > 1
    assert ended


async def test_a_piece_that_cannot_be_handed_on_is_told_with_the_next_one(at_once):
    tried, taken = [], []

    async def tell(piece):
        tried.append(piece)
        if len(tried) % 3 == 0:
            taken.append(piece)
        return len(tried) % 3 == 0

    async with Telling("a", lambda ids: "".join(map(str, ids)), tell) as telling:
        for t in range(1, 9):
            telling.on_tokens(tuple(range(t)))
            await asyncio.sleep(0.01)
    text = "".join(piece.text for piece in taken)
    assert len(tried) > len(taken) > 1
    assert "01234567".startswith(text)
    assert [piece.start for piece in taken] == [0, *np.cumsum([len(piece.text) for piece in taken])[:-1]]


async def test_a_text_that_cannot_be_told_comes_with_the_outcome(at_once, monkeypatch):
    async with corridor() as c:
        monkeypatch.setattr(c.backbone, "certain", lambda ids: 1 / 0)
        parts, scored = await told(c)
    assert parts == [scored.samples[0].text]


def outcome(job_id, text):
    return Scored(
        job_id, (HeadRef("h", "legend", 1),), (Scores((1.0,)),), "base", Usage(), (Sample((1,), text, "stop"),)
    )


class Workers:
    """An answer as the queue brings it, from hand-made pieces."""

    async def hear(self, *pieces, end):
        queue = MemoryQueue(max_tokens=1000)
        text = await Intake(queue).tell(DRAWING, heads=("h",), timeout=PATIENCE)
        [job] = await queue.take(1000)
        assert job.told
        for start, piece in pieces:
            assert await queue.tell(Piece(job.id, start, piece))
        await queue.settle([outcome(job.id, end) if isinstance(end, str) else Failed(job.id, end.code, "no")])
        parts = []
        try:
            async for part in text:
                parts.append(part)
            return parts
        except Exception as error:
            return [*parts, type(error)]
        finally:
            await text.aclose()


@pytest.mark.parametrize(
    ("pieces", "end", "parts"),
    [
        ([(0, "one "), (4, "two ")], "one two three", ["one ", "two ", "three"]),
        ([(0, "one "), (4, "two ")], "one two ", ["one ", "two "]),
        ([], "whole", ["whole"]),
        ([], "", []),
        ([(0, "one "), (4, "two "), (0, "one t"), (5, "wo th")], "one two three", ["one ", "two ", "th", "ree"]),
        ([(0, "one "), (8, "three")], "one two three", ["one ", "two three"]),  # one was lost
        ([(0, "one "), (4, "two "), (0, "on")], "one two", ["one ", "two ", Unavailable]),  # another text, shorter
        ([(0, "one "), (0, "two ")], "two", ["one ", Unavailable]),
        ([(0, "one "), (0, "one or "), (7, "none")], "one or none", ["one ", "or ", "none"]),
        ([(0, "one ")], "two", ["one ", Unavailable]),
        ([(0, "one ")], InternalError, ["one ", InternalError]),
    ],
)
async def test_no_text_is_given_twice_and_no_two_drawings_are_mixed(pieces, end, parts):
    assert await Workers().hear(*pieces, end=end) == parts


async def test_who_hangs_up_ends_the_drawing_and_hears_no_more():
    queue = MemoryQueue(max_tokens=1000)
    text = await Intake(queue).tell(DRAWING, heads=("h",), timeout=PATIENCE)
    [job] = await queue.take(1000)
    await text.aclose()
    assert await queue.tell(Piece(job.id, 0, "late"))
    assert text._news.qsize() <= 1  # that it was cancelled
    assert await queue.wanted([job]) == []
    assert not queue._hear


async def test_an_answer_that_stands_still_ends_with_its_deadline():
    queue = MemoryQueue(max_tokens=1000)
    text = await Intake(queue).tell(DRAWING, heads=("h",), timeout=0.05)
    with pytest.raises(DeadlineExceeded):
        await anext(text)


SEVERAL = Group((1, 2, 3), sampling=SamplingSpec(2, max_tokens=40))
FIRST, SECOND = Sample((1, 2), "one", "stop"), Sample((3, 4), "two", "rejected", stop_score=0.5)


async def follow(*ended, end):
    """What comes of two responses whose ends are told, through a queue."""
    queue = MemoryQueue(max_tokens=1000)
    samples = await Intake(queue).follow(SEVERAL, heads=("h",), timeout=PATIENCE)
    [job] = await queue.take(1000)
    assert job.told
    for index, sample in ended:
        assert await queue.tell(Ended(job.id, index, sample))
    await queue.settle(
        [replace(outcome(job.id, ""), samples=end) if isinstance(end, tuple) else Failed(job.id, end, "no")]
    )
    given = []
    try:
        async for one in samples:
            given.append(one.index)
        assert samples.scored.samples == end
    except Exception as error:
        given.append(type(error))
    finally:
        await samples.aclose()
    return given


@pytest.mark.parametrize(
    ("ended", "end", "given"),
    [
        ([(1, SECOND), (0, FIRST)], (FIRST, SECOND), [1, 0]),
        ([(1, SECOND)], (FIRST, SECOND), [1]),  # one was lost
        ([], (FIRST, SECOND), []),
        ([(1, SECOND), (1, SECOND), (0, FIRST)], (FIRST, SECOND), [1, 0]),  # another worker, the same drawing
        ([(1, SECOND), (1, FIRST)], (FIRST, SECOND), [1, Unavailable]),
        ([(0, SECOND)], (FIRST, SECOND), [0, Unavailable]),
        ([(0, FIRST)], InternalError.code, [0, InternalError]),
    ],
)
async def test_each_end_is_given_once_and_no_two_drawings_are_mixed(ended, end, given):
    assert await follow(*ended, end=end) == given


async def test_ends_are_told_when_they_are_final_and_not_after_the_outcome():
    final, told = set(), []

    async def rate(index, sample):
        return Ended("a", index, sample)

    async def tell(news):
        told.append((news.index, news.sample))
        return True

    async with TellingEnds("a", final.__contains__, rate, tell) as telling:
        telling.on_ended(0, FIRST)
        telling.on_ended(1, SECOND)
        await asyncio.sleep(0.01)
        assert told == [(1, SECOND)]
        final.add(0)
        telling.look()  # a decision point has passed
        await asyncio.sleep(0.01)
        assert told == [(1, SECOND), (0, FIRST)]
        telling.on_ended(2, FIRST)
        await asyncio.sleep(0.01)
        assert len(told) == 2
        final.add(2)
        telling.on_ended(3, SECOND)
    assert len(told) <= 3
