"""Quotas: what a key may have computed in a minute, in one process and by all replicas together."""

import pytest

from api.test_drawn import ASK, serving
from inward.api.auth import CALLER, Caller
from inward.errors import Overloaded, OverQuota
from inward.stores.connection import Connection
from inward.stores.quota import MemoryQuota, RedisQuota
from support.fake_services import HYBRID, SRR, FakeServices, error
from support.queues import KEYS
from support.waiting import PATIENCE


class Clock:
    now = 6000.0

    def __call__(self):
        return self.now


@pytest.fixture(params=["memory", "redis"])
async def opened(request):
    """Two replicas' quotas of 100 tokens and their clock; in memory they are one."""
    clock = Clock()
    if request.param == "memory":
        quota = MemoryQuota(clock=clock)
        yield quota, quota, clock
        return
    connection = Connection(request.getfixturevalue("redis_server").url, timeout=PATIENCE)
    yield *(RedisQuota(connection, KEYS, clock=clock) for _ in range(2)), clock
    await connection.close()


async def test_a_key_is_refused_once_its_minute_is_used_up_and_let_in_in_the_next(opened):
    first, second, clock = opened
    await first.spend("a", 60, 100)
    await second.spend("a", 500, 100)  # there was some left
    clock.now += 15
    with pytest.raises(OverQuota, match="100 tokens") as caught:
        await first.spend("a", 1, 100)
    assert caught.value.retry_after == 45
    await first.spend("b", 1, 100)
    await first.spend("a", 1, 1000)  # another number counts the same tokens
    clock.now += 45
    await second.spend("a", 1, 100)


async def test_who_was_let_in_is_counted_and_not_refused_and_what_was_not_computed_is_given_back(opened):
    first, second, _ = opened
    await first.spend("a", 100, 100)
    await second.spend("a", 20, None)
    await first.give_back("a", 100)
    await second.spend("a", 80, 100)
    with pytest.raises(OverQuota):
        await first.spend("a", 1, 100)
    await first.give_back("a", 1000)  # never below nothing
    await second.spend("a", 100, 100)
    with pytest.raises(OverQuota):
        await first.spend("a", 1, 100)


async def test_redis_forgets_what_was_used(redis_server):
    connection = Connection(redis_server.url, timeout=PATIENCE)
    await RedisQuota(connection, KEYS).spend("a", 5, 100)
    with redis_server.client() as client:
        [key] = client.keys(KEYS.key("quota", "*"))
        assert 0 < client.ttl(key) <= 120
    await connection.close()


async def test_over_its_quota_a_key_gets_429_with_retry_after_and_others_do_not():
    pairs = {"pairs": [{"prompt": "question", "chosen": "a good answer", "rejected": "no"}]}
    opened = FakeServices(keys=frozenset({"k", "l"}))
    object.__setattr__(opened.services, "quota", MemoryQuota(clock=Clock()))
    object.__setattr__(opened.services, "tokens_a_minute", 20)
    by = {key: {"authorization": f"Bearer {key}"} for key in "kl"}
    assert (await opened.post("/margin", pairs, headers=by["k"])).status_code == 200
    refused = await opened.post("/margin", pairs, headers=by["k"])
    assert (refused.status_code, refused.headers["retry-after"], error(refused)["code"]) == (429, "60", "over_quota")
    assert (await opened.post("/margin", pairs, headers=by["l"])).status_code == 200
    assert len(opened.intake.calls) == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_drawn_answers_count_as_well_streamed_or_not(stream):
    codes = []
    async with serving() as (opened, _):
        object.__setattr__(opened.services, "quota", MemoryQuota(clock=Clock()))
        object.__setattr__(opened.services, "tokens_a_minute", 1)
        for _ in range(2):
            token = CALLER.set(Caller("somebody"))
            codes.append((await opened.post("/rerank", {**ASK, "stream": stream})).status_code)
            CALLER.reset(token)
    assert codes == [200, 429]


async def test_what_there_is_no_room_for_is_not_charged():
    opened = FakeServices(keys=frozenset({"k"}))
    object.__setattr__(opened.services, "quota", MemoryQuota(clock=Clock()))
    object.__setattr__(opened.services, "tokens_a_minute", 20)
    pairs = {"pairs": [{"prompt": "question", "chosen": "a good answer", "rejected": "no"}]}
    codes = []
    for full in (True, True, True, False, False):
        opened.intake.error = Overloaded("the queue is full", retry_after=1.0) if full else None
        codes.append((await opened.post("/margin", pairs, headers={"authorization": "Bearer k"})).status_code)
    assert codes == [503, 503, 503, 200, 429]


async def test_a_request_that_was_let_in_is_not_refused_half_way():
    """Whatever it costs itself, and in however many parts it is computed."""
    opened = FakeServices(HYBRID, SRR, keys=frozenset({"k"}))
    object.__setattr__(opened.services, "quota", MemoryQuota(clock=Clock()))
    object.__setattr__(opened.services, "tokens_a_minute", 5)
    questions = [
        {"type": "predicate", "name": HYBRID.name, "instructions": ""},
        *2 * [{"type": "choice", "instructions": "Which?", "choices": [{"value": "a"}, {"value": "abc"}]}],
    ]
    body = {"input": "Two letters.", "questions": questions}
    key = {"authorization": "Bearer k"}
    assert [(await opened.post("/v1/decisions", body, headers=key)).status_code for _ in range(2)] == [200, 429]
    assert len(opened.intake.calls) == 3
