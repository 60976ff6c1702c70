"""A Redis that goes away is told of once, and once when it is back."""

import asyncio
import logging

import pytest

from inward.errors import Unavailable
from inward.queues.redis.outage import Outage
from inward.stores.connection import Refused
from support.queues import BEATING, in_redis, job
from support.waiting import until


@pytest.fixture
def told(caplog):
    """Level and name of what either side says of its Redis."""
    caplog.set_level(logging.INFO, logger="inward")
    return lambda: [(record.levelname, record.getMessage()) for record in caplog.records]


def test_an_outage_is_one_error_and_its_end_one_event(told):
    outage = Outage(worker="w")
    for _ in range(3):
        outage.began(Unavailable("Redis can't be reached (ConnectionError)"))
        outage.began(Unavailable("Redis can't be reached (TimeoutError)"))
    assert outage.reason == "Redis can't be reached (TimeoutError)"
    for _ in range(3):
        outage.ended()
    assert outage.reason is None
    assert told() == [("ERROR", "redis_away"), ("INFO", "redis_there")]


def test_one_that_comes_back_and_refuses_us_is_told_of_again_because_that_does_not_pass(told):
    outage = Outage()
    outage.began(Unavailable("Redis can't be reached (ConnectionError)"))
    for _ in range(3):
        outage.began(Refused("Redis refuses us (AuthenticationError)"))
    assert told() == [("ERROR", "redis_away")] * 2


def test_a_command_that_is_given_up_on_after_the_end_of_an_outage_is_no_new_one(told):
    outage = Outage()
    asked = outage.now()
    outage.began(Unavailable("Redis can't be reached (ConnectionError)"))
    outage.ended()
    outage.began(Unavailable("Redis can't be reached (TimeoutError)"), asked)
    assert outage.reason is None
    assert told() == [("ERROR", "redis_away"), ("INFO", "redis_there")]
    outage.began(Unavailable("Redis can't be reached (TimeoutError)"), outage.now())
    assert told()[2:] == [("ERROR", "redis_away")]


def test_before_it_was_asked_there_is_nothing_to_tell(told):
    outage = Outage("Redis was not asked yet")
    assert outage.reason == "Redis was not asked yet"
    outage.ended()
    assert outage.reason is None and told() == []
    late = Outage("Redis was not asked yet")
    late.began(Unavailable("Redis can't be reached (ConnectionError)"))
    assert told() == [("ERROR", "redis_away")]


async def test_each_side_of_the_queue_tells_once_however_often_it_tries(own_redis, told):
    server = own_redis()
    async with in_redis(server.url, producer=BEATING, consumer={"ttl": 0.3}) as q:
        taking = asyncio.create_task(q.consumer.take(100))
        server.kill()
        await until(lambda: q.producer.away and q.consumer.away)
        await asyncio.sleep(0.5)  # many more tries of both
        server.start()
        await until(lambda: not q.producer.away and not q.consumer.away and q.producer.workers)
        await q.producer.submit([job("a")])
        assert [one.id for one in await taking] == ["a"]
        outages = [line for line in told() if line[1].startswith("redis_")]
        assert sorted(outages) == [("ERROR", "redis_away")] * 2 + [("INFO", "redis_there")] * 2
