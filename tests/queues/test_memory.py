"""What the queue in memory promises beyond the contract of both queues."""

import asyncio

import pytest

from inward.errors import EngineDead, Overloaded
from inward.queues.base import Closed
from inward.queues.memory import MemoryQueue
from support.queues import done, ids, job


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


async def test_retry_after_is_the_time_until_there_is_room_at_the_measured_pace():
    clock = Clock()
    queue = MemoryQueue(max_tokens=100, clock=clock)
    first = [job(i, 10) for i in range(10)]
    await queue.submit(first)
    await queue.take(50)
    clock.now += 5  # 50 tokens in 5 s
    await queue.settle([done(j) for j in first[:5]])
    await queue.submit([job(i, 10) for i in range(10, 15)])
    with pytest.raises(Overloaded) as caught:
        await queue.submit([job("late", 40)])
    assert caught.value.retry_after == pytest.approx(4.0)  # 40 tokens have to go, at 10 a second


async def test_release_answers_everybody_and_admits_nobody():
    queue = MemoryQueue(max_tokens=1000)
    waits = await queue.submit([job("a"), job("b")])
    await queue.release(await queue.take(10), "out of memory")
    assert {o.code for o in await asyncio.gather(*waits)} == {EngineDead.code}
    with pytest.raises(EngineDead, match="out of memory"):
        await queue.submit([job("c")])
    assert queue.tokens == 0


async def test_a_closed_queue_is_emptied_and_then_says_so():
    queue = MemoryQueue(max_tokens=1000)
    await queue.submit([job("a")])
    await queue.close()
    with pytest.raises(Overloaded, match="shutting down"):
        await queue.submit([job("b")])
    assert ids(await queue.take(10)) == ["a"]
    with pytest.raises(Closed):
        await queue.take(10)
