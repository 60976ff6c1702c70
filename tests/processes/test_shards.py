"""The settings of several Redis servers, and real processes around them."""

import signal

import httpx
import pytest

from inward.errors import SetupError
from inward.processes.wiring import connect
from inward.queues.redis.consumer import RedisConsumer
from inward.queues.redis.producer import RedisProducer
from inward.queues.redis.sharded import ShardedConsumer, ShardedProducer
from inward.settings import Settings
from inward.stores.keys import Keys
from support.fleet import Fleet
from support.serving import write_model
from support.waiting import PATIENCE, wait_until

SENTINELS = "redis+sentinel://a:1,b:2/one/0"


@pytest.mark.parametrize(
    ("text", "urls"),
    [
        ("redis://a/0, redis://b/0", ("redis://a/0", "redis://b/0")),
        (f"{SENTINELS},rediss://:p@c:3/0", (SENTINELS, "rediss://:p@c:3/0")),
        ("redis://a/0", ("redis://a/0",)),
    ],
)
def test_urls_are_told_apart_at_the_commas_before_a_scheme(text, urls):
    settings = Settings(redis_urls=text)
    assert settings.redis_urls == urls and settings.resolved()["redis_urls"] == len(urls)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"redis_url": "redis://a", "redis_urls": "redis://a,redis://b"}, "named twice"),
        ({"redis_urls": "redis://a,redis://a"}, "one Redis is named twice"),
        ({"redis_urls": "http://a"}, r"begins otherwise.*\(shard 1 of --redis-urls\)"),
        ({"redis_urls": "redis://a,redis://b:x"}, r"\(shard 2 of --redis-urls\)"),
        ({"redis_url": "redis://b:x"}, r"\(--redis-url\)"),
        ({}, "--redis-url"),
    ],
)
def test_what_can_not_be_meant_is_refused(settings, said):
    with pytest.raises(SetupError, match=said):
        connect(Settings(**settings))


async def test_a_wrong_password_is_told_of_the_shard_that_refuses_it(own_redis):
    servers = [own_redis(requirepass="right") for _ in range(3)]
    urls = [server.url for server in servers]
    it = connect(Settings(redis_urls=",".join([*urls[:2], urls[2].replace("right", "wrong")])))
    with pytest.raises(SetupError, match="password in shard 3 of --redis-urls"):
        await it.check()
    await it.close()


async def test_one_url_is_the_queue_as_it_is_without_shards():
    one, two = (connect(Settings(redis_urls=urls)) for urls in ("redis://a", "redis://a,redis://b"))
    keys, settings = Keys("q"), Settings()
    assert type(one.producer(keys, max_tokens=1)) is RedisProducer
    assert type(one.consumer(keys, settings, bytes)) is RedisConsumer
    assert type(two.producer(keys, max_tokens=1)) is ShardedProducer
    assert type(two.consumer(keys, settings, bytes)) is ShardedConsumer
    for shards in (one, two):
        await shards.close()


def test_a_service_goes_on_with_the_shards_that_are_there(own_redis, tmp_path):
    servers = [own_redis(appendonly="yes") for _ in range(2)]
    write_model(tmp_path)
    urls = ",".join(server.url for server in servers)
    pairs = [{"prompt": f"question {i}", "chosen": "yes", "rejected": "no"} for i in range(12)]
    with Fleet(tmp_path, None, redis_urls=urls, queue="q") as fleet, httpx.Client(timeout=PATIENCE) as client:
        api, worker = fleet.api(), fleet.worker()
        fleet.wait_until_ready(api, worker)

        def margins():
            answer = client.post(api.url + "/margin", json={"pairs": pairs})
            return answer.status_code, [(m.get("error") or {}).get("code") for m in answer.json().get("margins", [])]

        assert wait_until(lambda: margins() == (200, [None] * 12))
        servers[1].kill()
        wait_until(lambda: "shard 2 of 2 is away" in client.get(api.url + "/readyz").text)
        wait_until(lambda: margins() == (200, [None] * 12))
        for pair in pairs:  # of either shard
            body = {"prompt": pair["prompt"], "candidates": [pair["chosen"], pair["rejected"]]}
            answer = client.post(api.url + "/rerank", json=body)
            assert answer.status_code == 200, answer.text
        wait_until(lambda: "shard 2 of 2" in client.get(worker.url + "/readyz").text)
        with servers[0].client() as home:
            held, tokens, *_ = Keys("q").of(home.get(Keys("q").served).decode()).book
            home.hset(held, "of others", "1 0-0 600000")
            home.set(tokens, 600_000)  # more than half of its part of the 2,000,000
            status, codes = margins()
            assert status == 200 and set(codes) == {None, "shard_away"}
            lost = [pair for pair, code in zip(pairs, codes, strict=True) if code]
            body = {"prompt": lost[0]["prompt"], "candidates": [lost[0]["chosen"], lost[0]["rejected"]]}
            for route, request in (("/margin", {"pairs": lost}), ("/rerank", body)):
                answer = client.post(api.url + route, json=request)
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shard_away")
                assert "shard 2 of 2" in answer.text and int(answer.headers["Retry-After"]) > 0
            home.delete(held, tokens)
        assert margins() == (200, [None] * 12)
        servers[1].start()
        wait_until(lambda: margins() == (200, [None] * 12))
        servers[0].signal(signal.SIGSTOP)
        try:
            wait_until(lambda: "shard 1 of 2 is away" in client.get(api.url + "/readyz").text)
            for i, pair in enumerate(pairs):
                body = {"prompt": pair["prompt"], "candidates": [pair["chosen"], pair["rejected"]]}
                answer = client.post(api.url + "/rerank", json=body, headers={"Idempotency-Key": str(i)})
                assert answer.status_code == 200, answer.text
        finally:
            servers[0].signal(signal.SIGCONT)
        wait_until(lambda: "away" not in client.get(api.url + "/readyz").text)
