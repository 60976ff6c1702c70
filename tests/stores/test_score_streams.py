"""Streams of scored rows: what a trainer's consumer group finds, with the code that ``docs/scores.md`` prints."""

import re
from contextlib import asynccontextmanager
from itertools import islice
from pathlib import Path

import pytest

from inward.stores.connection import Connection
from inward.stores.score_streams import ScoreStreams
from support.fake_services import FakeServices, error
from support.queues import KEYS
from support.waiting import PATIENCE

DOC = (Path(__file__).parents[2] / "docs/scores.md").read_text(encoding="utf-8")
STREAM = KEYS.scores("dpo")


@pytest.fixture(scope="module")
def batches():
    """The consumer of the document."""
    names = {}
    exec(re.search(r"```python\n(.*?)```", DOC, re.DOTALL)[1], names)
    return names["batches"]


@asynccontextmanager
async def streams(server, **options):
    connection = Connection(server.url, timeout=PATIENCE)
    yield ScoreStreams(connection, KEYS, **{"keep": 60, **options})
    await connection.close()


def body(n):
    return {"prompt": f"p{n}", "candidates": ["bb", "a" * (n + 3)], "append_to": "dpo"}


async def test_the_pair_of_a_rerank_that_asks_for_it_is_appended_and_a_trainer_takes_it(redis_server, batches):
    api = FakeServices()
    async with streams(redis_server) as rows:
        object.__setattr__(api.services, "scores", rows)
        answer = (await api.post("/rerank", body(0))).json()
        assert (await api.post("/rerank", body(1) | {"append_to": None})).status_code == 200
        assert (await api.post("/rerank", body(1) | {"candidates": ["ab", "cd"]})).json()["pair"] is None
    with redis_server.client() as client:
        assert next(batches(client, STREAM, "g", "me")) == [
            {**answer["pair"], "head": answer["head"], "policy_version": answer["policy_version"]}
        ]
        assert client.xlen(STREAM) == 1
        assert 0 < client.ttl(STREAM) <= 60
    assert {"prompt", "chosen", "rejected", "chosen_score", "rejected_score", "margin", "confidence"} <= answer[
        "pair"
    ].keys()


async def test_a_trainer_that_crashes_finds_its_rows_again_and_acknowledged_ones_never(redis_server, batches):
    async with streams(redis_server) as rows:
        await rows.append("dpo", [{"n": n} for n in range(10)])
    with redis_server.client() as client:
        first = batches(client, STREAM, "g", "me", count=3)
        assert [[row["n"] for row in batch] for batch in islice(first, 2)] == [
            [0, 1, 2],
            [3, 4, 5],
        ]  # the second is not acknowledged
        after = batches(client, STREAM, "g", "me", count=3)
        assert [[row["n"] for row in batch] for batch in islice((b for b in after if b), 2)] == [[3, 4, 5], [6, 7, 8]]
        heir = batches(client, STREAM, "g", "another", count=3, idle_ms=0)
        assert [row["n"] for batch in islice((b for b in heir if b), 2) for row in batch] == [6, 7, 8, 9]


async def test_a_stream_keeps_the_newest_rows_and_a_slow_trainer_goes_on_with_them(redis_server, batches):
    async with streams(redis_server, most=200) as rows:
        await rows.append("dpo", [{"n": n} for n in range(10)])
        with redis_server.client() as client:
            taken = batches(client, STREAM, "g", "me", count=10)
            assert len(next(taken)) == 10
            await rows.append("dpo", [{"n": n} for n in range(10, 2000)])
            assert 200 <= client.xlen(STREAM) < 500
            again = [row["n"] for batch in islice(batches(client, STREAM, "g", "me"), 2) for row in batch]
            assert again and min(again) > 10


async def test_without_a_redis_the_request_is_refused_before_anything_is_computed():
    api = FakeServices()
    answer = await api.post("/rerank", body(0))
    assert (answer.status_code, error(answer)["param"], "--redis-url" in error(answer)["message"]) == (
        409,
        "append_to",
        True,
    )
    assert api.intake.calls == []


async def test_a_redis_that_is_away_is_a_503(own_redis):
    server, api = own_redis(), FakeServices()
    async with streams(server) as rows:
        object.__setattr__(api.services, "scores", rows)
        server.kill()
        assert (await api.post("/rerank", body(0))).status_code == 503
    assert (await api.post("/rerank", body(0) | {"append_to": "no spaces"})).status_code == 422
