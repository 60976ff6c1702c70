"""What both stores of answers promise, and that beginning costs the same however many keys there are."""

import pytest

from inward.stores.connection import Connection
from inward.stores.idempotency import LARGEST, MemoryIdempotencyStore, RedisIdempotencyStore, StoredResponse
from support.queues import KEYS
from support.waiting import PATIENCE

ASKED = "a" * 64


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture(params=["memory", "redis"])
async def store(request):
    if request.param == "memory":
        yield MemoryIdempotencyStore(keep=PATIENCE, running=PATIENCE)
        return
    connection = Connection(request.getfixturevalue("redis_server").url, timeout=PATIENCE)
    yield RedisIdempotencyStore(connection, KEYS, keep=PATIENCE, running=PATIENCE)
    await connection.close()


async def test_one_is_told_to_go_on_the_others_that_it_is_being_worked_out_and_later_ones_the_answer(store):
    assert await store.begin("k", ASKED) is None
    assert await store.begin("k", ASKED) == StoredResponse(ASKED)
    await store.finish("k", ASKED, b"answer")
    assert await store.begin("k", "b" * 64) == StoredResponse(ASKED, b"answer")
    assert await store.begin("another", ASKED) is None


async def test_what_was_forgotten_or_is_too_large_is_begun_again(store):
    for end in (store.forget("k"), store.finish("k", ASKED, b"x" * (LARGEST + 1))):
        assert await store.begin("k", ASKED) is None
        await end
    assert await store.begin("k", ASKED) is None


async def test_in_memory_answers_and_those_that_never_came_end():
    clock = Clock()
    store = MemoryIdempotencyStore(keep=10, running=5, clock=clock)
    assert await store.begin("kept", ASKED) is None
    await store.finish("kept", ASKED, b"x")
    assert await store.begin("never", ASKED) is None
    clock.now += 6
    assert await store.begin("never", ASKED) is None
    assert (await store.begin("kept", ASKED)).answer == b"x"
    clock.now += 6
    assert await store.begin("kept", ASKED) is None


async def test_in_memory_the_oldest_answers_make_room_and_what_is_being_worked_out_stays():
    store = MemoryIdempotencyStore(keep=10, running=10, room=25)
    await store.begin("running", ASKED)
    for i in range(4):
        await store.begin(f"k{i}", ASKED)
        await store.finish(f"k{i}", ASKED, b"x" * 10)
    assert (await store.begin("running", ASKED)).answer is None
    assert [bool(await store.begin(f"k{i}", ASKED)) for i in range(4)] == [False, False, True, True]


async def test_in_memory_beginning_looks_at_no_more_than_what_has_expired():
    looks = 0

    class Counted(float):
        def __le__(self, other):
            nonlocal looks
            looks += 1
            return float(self) <= other

        def __add__(self, other):
            return Counted(float(self) + other)

    store = MemoryIdempotencyStore(keep=10, running=10, clock=lambda: Counted(1.0))
    for i in range(1000):
        await store.begin(f"k{i}", ASKED)
        await store.finish(f"k{i}", ASKED, b"x")
    assert looks < 3000


async def test_a_time_shorter_than_a_millisecond_is_one_to_redis(redis_server):
    connection = Connection(redis_server.url, timeout=PATIENCE)
    store = RedisIdempotencyStore(connection, KEYS, keep=1e-4, running=1e-4)
    assert await store.begin("short", ASKED) is None
    await store.finish("short", ASKED, b"answer")
    await connection.close()
