"""What both queues promise, whichever one is in use."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from inward.errors import Overloaded
from inward.queues.base import Closed
from inward.types import Ended, Failed, Piece, Sample
from support.queues import InMemory, done, ids, in_redis, job


@pytest.fixture(params=["memory", "redis"])
def opened(request):
    """A function that opens a queue of one kind."""
    if request.param == "redis":
        url = request.getfixturevalue("redis_server").url
        return lambda max_tokens=1000: in_redis(url, max_tokens=max_tokens)

    @asynccontextmanager
    async def in_memory(max_tokens=1000):
        yield InMemory(max_tokens)

    return in_memory


async def test_jobs_are_taken_in_order_of_arrival_within_the_tokens_asked_for(opened):
    async with opened() as q:
        await q.producer.submit([job(i) for i in range(5)])
        assert ids(await q.consumer.take(25)) == ["0", "1"]
        assert ids(await q.consumer.take(5)) == ["2"]  # larger than asked for: alone
        assert ids(await q.consumer.take(1000)) == ["3", "4"]


async def test_a_job_arrives_as_it_was_sent(opened):
    async with opened() as q:
        sent = job("a", 7, pair=True, details=frozenset({"tokens"}), deadline=12345.5, enqueued=12.25, priority="bulk")
        await q.producer.submit([sent])
        [taken] = await q.consumer.take(100)
        assert (taken.group, taken.heads, taken.details, taken.pair) == (
            sent.group,
            sent.heads,
            sent.details,
            sent.pair,
        )
        assert (taken.deadline, taken.enqueued, taken.priority, taken.deliveries) == (12345.5, 12.25, "bulk", 1)


async def test_all_jobs_of_a_request_are_admitted_or_none(opened):
    async with opened(max_tokens=100) as q:
        await q.producer.submit([job("a", 60)])
        with pytest.raises(Overloaded) as caught:
            await q.producer.submit([job("b", 30), job("c", 30)])
        assert caught.value.retry_after > 0
        assert await q.tokens() == 60
        assert ids(await q.consumer.take(1000)) == ["a"]


async def test_what_is_being_computed_still_takes_room(opened):
    async with opened(max_tokens=100) as q:
        a = job("a", 90)
        await q.producer.submit([a])
        await q.consumer.take(1000)
        with pytest.raises(Overloaded):
            await q.producer.submit([job("b", 20)])
        await q.consumer.settle([done(a)])
        await q.producer.submit([job("b", 20)])
        assert await q.tokens() == 20


async def test_a_request_larger_than_the_queue_is_admitted_when_nothing_else_is_there(opened):
    async with opened(max_tokens=100) as q:
        await q.producer.submit([job("a", 500)])
        with pytest.raises(Overloaded):
            await q.producer.submit([job("b", 1)])


async def test_each_caller_gets_its_own_outcome_once(opened):
    async with opened() as q:
        waits = await q.producer.submit([job("a"), job("b")])
        await q.consumer.take(1000)
        await q.consumer.settle([Failed("b", "x", "first"), Failed("b", "x", "second"), Failed("a", "x", "mine")])
        await q.consumer.settle([Failed("a", "x", "third")])
        assert [o.message for o in await asyncio.gather(*waits)] == ["mine", "first"]
        assert await q.tokens() == 0


async def test_a_failure_says_which_field_is_to_blame(opened):
    async with opened() as q:
        (wait,) = await q.producer.submit([job("a")])
        await q.consumer.take(1000)
        await q.consumer.settle([Failed("a", "invalid_field", "not calibrated", param="stop_when.fpr")])
        assert (await wait).param == "stop_when.fpr"


async def test_pieces_come_in_order_before_the_outcome_to_who_wants_them(opened):
    async with opened() as q:
        heard = []
        waits = await q.producer.submit([job("a", told=True), job("b")], heard.append)
        assert [one.told for one in await q.consumer.take(1000)] == [True, False]
        pieces = [Piece("a", 2 * i, f"{i} ") for i in range(19)]
        pieces.append(Ended("a", 1, Sample((1, 2), "x", "rejected", stop_score=0.5, held_back=1), None, None))
        for piece in pieces:
            assert await q.consumer.tell(piece)
        waits[0].add_done_callback(heard.append)
        await q.consumer.settle([Failed("a", "x", "end"), Failed("b", "x", "end")])
        await asyncio.gather(*waits)
        assert heard[:-1] == pieces
        assert heard[-1] is waits[0]
        await q.consumer.tell(Piece("a", 40, "late"))
        await asyncio.sleep(0.05)
        assert len(heard) == 21


async def test_who_left_hears_nothing_more(opened):
    async with opened() as q:
        heard = []
        await q.producer.submit([job("a", told=True)], heard.append)
        taken = await q.consumer.take(1000)
        await q.producer.abandon(["a"])
        await q.consumer.tell(Piece("a", 0, "late"))
        assert await q.consumer.wanted(taken) == []
        assert heard == []


async def test_abandoned_jobs_are_not_given_to_a_worker_and_free_their_room(opened):
    async with opened() as q:
        await q.producer.submit([job("a"), job("b"), job("c")])
        await q.producer.abandon(["b"])
        assert await q.tokens() == 20
        assert ids(await q.consumer.take(1000)) == ["a", "c"]


async def test_jobs_abandoned_after_they_were_taken_are_not_wanted(opened):
    async with opened() as q:
        await q.producer.submit([job("a"), job("b")])
        taken = await q.consumer.take(1000)
        await q.producer.abandon(["a"])
        assert ids(await q.consumer.wanted(taken)) == ["b"]
        assert await q.tokens() == 10


async def test_abandoning_what_is_answered_changes_nothing(opened):
    async with opened() as q:
        [wait] = await q.producer.submit([job("a")])
        await q.consumer.settle([done(j, "answer") for j in await q.consumer.take(100)])
        assert (await wait).message == "answer"
        await q.producer.abandon(["a"])
        assert (await wait).message == "answer"
        assert await q.tokens() == 0


async def test_take_waits_for_a_job(opened):
    async with opened() as q:
        taking = asyncio.create_task(q.consumer.take(10))
        await asyncio.sleep(0.05)
        assert not taking.done()
        await q.producer.submit([job("a")])
        assert ids(await taking) == ["a"]


async def test_a_closed_side_admits_nobody_and_takes_nothing_more(opened):
    async with opened() as q:
        await q.producer.close()
        with pytest.raises(Overloaded, match="shutting down"):
            await q.producer.submit([job("b")])
        await q.consumer.close()
        with pytest.raises(Closed):
            await q.consumer.take(10)
