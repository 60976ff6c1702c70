import asyncio
from types import SimpleNamespace

import httpx
import pytest

from inward.api.app import create_app
from inward.errors import ShardAway, Unavailable
from inward.stores.connection import Connection
from inward.stores.idempotency import LARGEST, MemoryIdempotencyStore, RedisIdempotencyStore
from support.fake_services import FakeServices, error
from support.queues import KEYS
from support.waiting import PATIENCE, until

PAIRS = {"pairs": [{"prompt": "a", "chosen": "bb", "rejected": "c"}]}
OTHER = {"pairs": [{"prompt": "a", "chosen": "b", "rejected": "c"}]}
KEY = {"idempotency-key": "k1"}


async def test_the_same_key_and_body_get_the_stored_answer_and_nothing_is_computed():
    api = FakeServices()
    first = await api.post("/margin", PAIRS, headers=KEY)
    again = await api.post("/margin", PAIRS, headers=KEY)
    assert (again.status_code, again.json()) == (200, first.json())
    assert again.headers["idempotency-replayed"] == "true"
    assert "idempotency-replayed" not in first.headers
    assert len(api.intake.calls) == 1


async def test_a_replayed_answer_keeps_its_headers():
    api = FakeServices()
    first, again = [await api.post("/margin", PAIRS, headers=KEY) for _ in range(2)]
    own = {"x-request-id", "x-total-time", "idempotency-replayed"}  # of the request, not of the answer
    assert {k: v for k, v in again.headers.items() if k not in own} == {
        k: v for k, v in first.headers.items() if k not in own
    }
    assert again.headers["x-inference-time"] == "5.00"


class FakeJobs:
    """Counts the rows that it takes."""

    def __init__(self):
        self.created = []

    async def create(self, kind, lines, *, head, scores, caller):
        self.created.append([line async for line in lines])
        return SimpleNamespace(body=lambda: {"id": f"{len(self.created):032x}", "rows": len(self.created[-1])})


def upload(api, *lines):
    async def chunks():
        for line in lines:
            yield line

    return api.post("/jobs?kind=margin", chunks(), headers={**KEY, "content-type": "application/x-ndjson"})


async def test_a_replayed_upload_keeps_its_status_and_another_body_of_the_same_length_is_told_apart():
    api = FakeServices()
    jobs = FakeJobs()
    object.__setattr__(api.services, "jobs", jobs)
    first = await upload(api, b'{"a": 1}\n', b'{"a": 2}\n')
    again = await upload(api, b'{"a": 1}', b'\n{"a": 2}\n')  # in other pieces
    assert (first.status_code, again.status_code) == (201, 201)
    assert again.json() == first.json() and again.headers["idempotency-replayed"] == "true"
    other = await upload(api, b'{"a": 1}\n', b'{"a": 3}\n')
    assert (other.status_code, error(other)["param"]) == (422, "Idempotency-Key")
    assert len(jobs.created) == 1


async def test_another_body_or_route_under_the_same_key_is_a_422():
    api = FakeServices()
    await api.post("/margin", PAIRS, headers=KEY)
    for path in ("/margin", "/score"):
        answer = await api.post(path, OTHER, headers=KEY)
        assert (answer.status_code, error(answer)["param"]) == (422, "Idempotency-Key")
    assert len(api.intake.calls) == 1


async def test_a_key_in_progress_is_a_409_and_says_when_to_come_back():
    api = FakeServices()
    api.intake.hold = asyncio.Event()
    first = asyncio.create_task(api.post("/margin", PAIRS, headers=KEY))
    await api.intake.started.wait()
    answer = await api.post("/margin", PAIRS, headers=KEY)
    assert (answer.status_code, answer.headers["retry-after"]) == (409, "1")
    api.intake.hold.set()
    assert (await first).status_code == 200
    assert len(api.intake.calls) == 1


async def test_an_error_is_not_kept():
    from inward.errors import Overloaded

    api = FakeServices()
    api.intake.error = Overloaded("full", retry_after=1)
    assert (await api.post("/margin", PAIRS, headers=KEY)).status_code == 503
    api.intake.error = None
    assert (await api.post("/margin", PAIRS, headers=KEY)).status_code == 200


class AwayStore:
    """Its Redis can't be reached."""

    async def begin(self, key, request):
        raise Unavailable("Redis can't be reached")


async def test_scores_and_ranks_of_given_candidates_come_without_the_store_and_all_else_waits_for_it():
    api = FakeServices()
    object.__setattr__(api.services, "idempotency", AwayStore())
    api.app = create_app(api.services)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(api.app), base_url="http://test") as client:
        assert (await client.post("/margin", json=PAIRS, headers=KEY)).status_code == 200
        given = {"prompt": "a", "candidates": ["b", "cc"]}
        others = ({"query": "a", "documents": ["b", "cc"]}, {"query": "a", "texts": ["b", "cc"]})
        for body in (given, *others):
            assert (await client.post("/rerank", json=body, headers=KEY)).status_code == 200
        for body in ({"prompt": "a", "n": 2}, given | {"append_to": "s"}, [given]):
            assert (await client.post("/rerank", json=body, headers=KEY)).status_code == 503
        for content in (b"", b"{", b'{"candidates": "\xff"}'):
            assert (await client.post("/rerank", content=content, headers=KEY)).status_code == 503


async def test_an_answer_of_which_a_shard_was_away_is_not_kept():
    api = FakeServices()
    two = {"pairs": PAIRS["pairs"] * 2}
    api.intake.outcome = lambda i, scored: ShardAway("away") if i else scored
    assert (await api.post("/margin", two, headers=KEY)).json()["margins"][1]["error"]["code"] == "shard_away"
    api.intake.outcome = lambda i, scored: scored
    again = await api.post("/margin", two, headers=KEY)
    assert "idempotency-replayed" not in again.headers and again.json()["margins"][1]["error"] is None


@pytest.mark.parametrize("way", ["authorization: Bearer ", "x-api-key: "])
async def test_keys_of_different_callers_do_not_meet(way):
    api = FakeServices(keys=frozenset({"one", "two"}))
    header, scheme = way.split(": ")
    answers = [
        await api.post("/margin", body, headers={**KEY, header: f"{scheme}{who}"})
        for who, body in (("one", PAIRS), ("two", PAIRS), ("two", PAIRS), ("one", OTHER))
    ]
    assert [(a.status_code, "idempotency-replayed" in a.headers) for a in answers] == [
        (200, False), (200, False), (200, True), (422, False)
    ]  # fmt: skip


@pytest.mark.parametrize("key", ["", "with space", "x" * 256])
async def test_a_key_that_is_none_is_a_422(key):
    answer = await FakeServices().post("/margin", PAIRS, headers={"idempotency-key": key})
    assert (answer.status_code, error(answer)["param"]) == (422, "Idempotency-Key")


KEEP, RUNNING = 600.0, 300.0


@pytest.fixture(params=["memory", "redis"])
async def stored(request):
    """The stores, and a function that lets seconds pass for them."""
    if request.param == "memory":
        clock = Clock()
        yield MemoryIdempotencyStore(keep=KEEP, running=RUNNING, clock=clock), clock.go_on
        return
    server = request.getfixturevalue("redis_server")
    connection = Connection(server.url, timeout=PATIENCE)

    def pass_time(seconds):
        with server.client() as client:
            for key in client.keys("*"):
                client.pexpire(key, max(0, client.pttl(key) - round(1000 * seconds)))

    yield RedisIdempotencyStore(connection, KEYS, keep=KEEP, running=RUNNING), pass_time
    await connection.close()


@pytest.fixture
def answered(stored):
    return stored[0]


@pytest.fixture
def pass_time(stored):
    return stored[1]


class Clock:
    now = 100.0

    def __call__(self):
        return self.now

    def go_on(self, seconds):
        self.now += seconds


H1, H2 = "1" * 64, "2" * 64


async def test_one_of_many_that_begin_at_once_goes_on(answered):
    begun = await asyncio.gather(*(answered.begin("k", H1) for _ in range(20)))
    assert [asked for asked in begun if asked is None] == [None]
    assert {asked.answer for asked in begun if asked is not None} == {None}


async def test_an_answer_is_kept_for_a_while_and_then_forgotten(answered, pass_time):
    assert await answered.begin("k", H1) is None
    await answered.finish("k", H1, b"answer")
    pass_time(KEEP / 2)
    asked = await answered.begin("k", H2)
    assert (asked.request, asked.answer) == (H1, b"answer")
    pass_time(KEEP / 2)
    assert await answered.begin("k", H2) is None


async def test_one_that_never_came_is_given_up(answered, pass_time):
    assert await answered.begin("k", H1) is None
    pass_time(RUNNING)
    assert await answered.begin("k", H1) is None


async def test_what_is_forgotten_or_too_large_is_worked_out_again(answered):
    await answered.begin("k", H1)
    await answered.forget("k")
    assert await answered.begin("k", H1) is None
    await answered.finish("k", H1, b"x" * (LARGEST + 1))
    assert await answered.begin("k", H1) is None


async def test_what_could_not_be_forgotten_is_forgotten_once_redis_is_back(own_redis):
    server = own_redis(appendonly="yes", appendfsync="always")
    connection = Connection(server.url, timeout=PATIENCE)
    answered = RedisIdempotencyStore(connection, KEYS, keep=3600.0, running=3600.0)
    assert await answered.begin("k", H1) is None
    assert await answered.begin("other", H1) is None
    server.kill()
    await answered.forget("k")
    server.start()

    async def free():
        try:
            return await answered.begin("k", H1) is None
        except Unavailable:
            return False

    await until(free)
    other = await answered.begin("other", H1)
    assert other is not None and other.answer is None, "it is still being worked out"
    await connection.close()


async def test_the_oldest_answers_make_room_for_new_ones():
    answered = MemoryIdempotencyStore(keep=60, running=60, room=25)
    for key in "abc":
        await answered.begin(key, H1)
        await answered.finish(key, H1, b"0123456789")
    assert await answered.begin("a", H1) is None
    assert (await answered.begin("b", H1)).answer == b"0123456789"
