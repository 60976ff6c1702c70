"""Quotas: what a key may have computed in a minute, in one process and by all replicas together."""

import pytest

from api.test_drawn import ASK, serving
from inward.api.auth import CALLER, Caller
from inward.errors import OverQuota
from inward.stores.connection import Connection
from inward.stores.quota import MemoryQuota, RedisQuota
from support.fake_services import FakeServices, error
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
    token = CALLER.set(Caller("somebody"))
    try:
        async with serving() as (opened, _):
            object.__setattr__(opened.services, "quota", MemoryQuota(clock=Clock()))
            object.__setattr__(opened.services, "tokens_a_minute", 1)
            codes = [(await opened.post("/rerank", {**ASK, "stream": stream})).status_code for _ in range(2)]
    finally:
        CALLER.reset(token)
    assert codes == [200, 429]
