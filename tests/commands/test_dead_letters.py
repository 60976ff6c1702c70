"""``inward dead-letters`` against a real Redis, with a worker in this process."""

import asyncio
import json

import pytest

from inward import codec
from inward.__main__ import main
from inward.queues.redis.dead_letters import DeadLetters
from inward.stores.keys import Keys
from inward.types import HeadRef, Scored, Scores, Usage
from support.queues import in_redis, job

KEYS = Keys("test")


@pytest.fixture
def letters(redis_server):
    """Two dead letters in the queue ``test``; the second can't be read."""
    with redis_server.client() as client:
        for name, data in (("a", codec.encode(job("a", 7, pair=True))), ("b", b"\x63")):
            client.xadd(
                KEYS.dead, {"id": name, "to": "", "job": data, "reason": "3 workers ended", "deliveries": 4, "queue": 1}
            )
    return redis_server


def inward(server, *words):
    return main(["dead-letters", *words, "--redis-url", server.url, "--queue", "test"])


def listed(server, capsys):
    assert inward(server, "list") == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_they_are_listed_oldest_first_without_text(letters, capsys):
    rows = listed(letters, capsys)
    assert [(r["job"], r["deliveries"], r["reason"], r["tokens"], r["heads"]) for r in rows] == [
        ("a", 4, "3 workers ended", 7, ["h"]),
        ("b", 4, "3 workers ended", None, None),
    ]


def test_one_is_shown_by_its_sizes(letters, capsys):
    entry = listed(letters, capsys)[0]["entry"]
    assert inward(letters, "show", entry) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["prompt_tokens"], shown["response_tokens"], shown["pair"]) == (7, [], True)
    assert not {"prompt", "responses", "prompt_ids"} & set(shown)


def test_named_ones_are_dropped_and_all_of_them(letters, capsys):
    first, second = (row["entry"] for row in listed(letters, capsys))
    assert inward(letters, "drop", first) == 0
    assert [row["entry"] for row in listed_after(letters, capsys)] == [second]
    assert inward(letters, "drop", "--all") == 0
    assert listed_after(letters, capsys) == []


def listed_after(server, capsys):
    capsys.readouterr()
    return listed(server, capsys)


@pytest.mark.parametrize(
    ("words", "said"), [(["drop"], "or say --all"), (["drop", "1-1"], "no dead letter 1-1"), (["show", "0-1"], "0-1")]
)
def test_what_is_not_there_or_not_named_is_an_error_that_says_so(letters, capsys, words, said):
    assert inward(letters, *words) == 2
    assert said in capsys.readouterr().err


def test_without_a_redis_it_says_how_to_name_one(capsys):
    assert main(["dead-letters", "list", "--queue", "test"]) == 2
    assert "--redis-url" in capsys.readouterr().err


async def test_those_that_are_scored_when_replayed_are_no_dead_letters_any_more(letters, capsys):
    async with in_redis(letters.url) as q:
        serving = asyncio.create_task(score_everything(q.consumer))
        assert await asyncio.to_thread(inward, letters, "replay", "--all") == 1
        serving.cancel()
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [(r["job"], r["scored"]) for r in rows] == [("a", True), ("b", False)]
        assert [letter.job_id for letter in await DeadLetters([q.redis], KEYS).all()] == ["b"]


async def test_a_letter_of_another_backbone_is_not_replayed_to_the_one_that_serves_now(letters, capsys):
    fields = {"id": "c", "to": "", "job": codec.encode(job("c", 7)), "reason": "x", "deliveries": 4, "queue": 1}
    with letters.client() as client:
        entry = client.xadd(KEYS.dead, fields | {"backbone": "sha256:former:float32"}).decode()
    async with in_redis(letters.url) as q:
        serving = asyncio.create_task(score_everything(q.consumer))
        assert await asyncio.to_thread(inward, letters, "replay", entry) == 1
        serving.cancel()
    assert "sha256:former:float32" in json.loads(capsys.readouterr().out)["error"]


async def score_everything(worker):
    while True:
        for taken in await worker.wanted(await worker.take(100)):
            await worker.settle([Scored(taken.id, (HeadRef("h", "legend", 1),), (Scores((1.0,)),), "base", Usage())])
