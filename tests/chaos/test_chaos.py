"""Deaths, freezes and losses under load, with real processes and a real Redis: everybody gets exactly one right answer.

A bulk job runs beside the callers and ends with exactly its rows. Small and short here; ``make chaos`` runs it at full
size (INWARD_CHAOS=full: 64 callers, 5,000 pairs, a freeze of 60 s, a failover).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from inward.stores.keys import Keys
from support.fleet import Fleet, Process
from support.queues import age, endless
from support.redis_server import RedisServer, Sentinel
from support.serving import write_model
from support.waiting import PATIENCE, until

FULL = os.environ.get("INWARD_CHAOS") == "full"
CALLERS, PAIRS, AT_ONCE = (64, 5000, 8) if FULL else (16, 640, 8)
BULK = 2500 if FULL else 200
IDLE = 20.0 if FULL else 1.0
FREEZE = 60.0 if FULL else 0.0
"""Seconds beyond those after which others take over."""
KEYS = Keys("chaos")
JSONL = {"content-type": "application/x-ndjson"}
SLOW = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chaos")
    write_model(folder)
    return folder


@pytest.fixture
def redis(own_redis):
    return own_redis(appendonly="yes", appendfsync="everysec")


@pytest.fixture
def fleet(folder, redis):
    with Fleet(folder, redis.url, queue="chaos", presence=30, claim_idle=IDLE, max_deliveries=50) as fleet:
        yield fleet


class Load:
    """Callers that each send their share of the pairs, a few at a time, and come again when they are told to."""

    def __init__(self, *urls: str) -> None:
        self.urls = urls
        self.answers: dict[int, list[float]] = {}
        self.refused: list[str] = []
        self.lost = 0
        self.begun = asyncio.Event()

    async def run(self) -> None:
        async with httpx.AsyncClient(timeout=2 * PATIENCE, limits=httpx.Limits(max_connections=None)) as client:
            await asyncio.gather(
                *(
                    self._caller(client, i % len(self.urls), range(i * PAIRS // CALLERS, (i + 1) * PAIRS // CALLERS))
                    for i in range(CALLERS)
                )
            )

    async def _caller(self, client: httpx.AsyncClient, which: int, numbers: range) -> None:
        for first in range(numbers.start, numbers.stop, AT_ONCE):
            some = range(first, min(first + AT_ONCE, numbers.stop))
            try:
                margins = await self.answered(client, self.urls[which], some)
            except httpx.TransportError:  # this replica is dead: its callers know
                self.lost += 1
                return
            self.begun.set()
            for number, margin in zip(some, margins, strict=True):
                self.answers.setdefault(number, []).append(margin)

    async def answered(self, client: httpx.AsyncClient, url: str, numbers: Sequence[int]) -> list[float]:
        """The margins; who is told to come again does so."""
        margins = await self.posted(client, url, [pair(n) for n in numbers])
        return [m["margin"] for m in margins]

    async def posted(self, client: httpx.AsyncClient, url: str, pairs: list[dict[str, str]]) -> list[dict[str, Any]]:
        """What becomes of these pairs; who is told to come again does so."""
        while True:
            answer = await client.post(url + "/margin", json={"pairs": pairs})
            if answer.status_code == 200:
                return list(answer.json()["margins"])
            assert answer.status_code == 503, answer.text
            self.refused.append(answer.json()["error"]["message"])
            await asyncio.sleep(min(float(answer.headers["retry-after"]), 0.5))

    async def check(self, url: str) -> None:
        """Every answer is the one that the pair gets alone."""
        assert all(len(margins) == 1 for margins in self.answers.values())
        async with httpx.AsyncClient(timeout=2 * PATIENCE) as client:
            gate = asyncio.Semaphore(8)

            async def alone(number: int) -> float:
                async with gate:
                    return (await self.answered(client, url, [number]))[0]

            some = sorted(self.answers)[:: 1 if FULL else 5]
            expected = await asyncio.gather(*(alone(number) for number in some))
        assert [self.answers[number][0] for number in some] == pytest.approx(expected, rel=1e-4, abs=1e-5)


class Bulk:
    """A bulk job of its own pairs, sent to a replica that will live."""

    def __init__(self, url: str) -> None:
        self.url, self.id = url, ""

    async def begin(self) -> Bulk:
        rows = "\n".join(json.dumps(pair(PAIRS + n)) for n in range(BULK))
        async with httpx.AsyncClient(base_url=self.url, timeout=PATIENCE) as client:
            answer = await client.post(
                "/jobs?kind=margin&append_to=chaos", content=rows, headers={"content-type": "application/x-ndjson"}
            )
        assert answer.status_code == 201, answer.text
        self.id = answer.json()["id"]
        return self

    async def check(self, redis: RedisServer, *, once: bool = True) -> None:
        """It is done, and each row is there once and is what the pair gets alone; in the stream as well (``once``:
        exactly once)."""
        async with httpx.AsyncClient(base_url=self.url, timeout=PATIENCE) as client:

            async def state() -> str:
                answer = await client.get(f"/jobs/{self.id}")
                return str(answer.json()["state"]) if answer.status_code == 200 else "unknown"

            async def done() -> bool:
                return await state() == "done"

            await until(done)
            rows = [json.loads(line) for line in (await client.get(f"/jobs/{self.id}/results")).text.splitlines()]
            assert [row["index"] for row in rows] == list(range(BULK))
            some = range(0, BULK, 1 if FULL else 20)
            alone = [(await Load().answered(client, self.url, [PAIRS + n]))[0] for n in some]
        assert [rows[n]["margin"] for n in some] == pytest.approx(alone, rel=1e-4, abs=1e-5)
        with redis.client() as client:
            streamed = [json.loads(fields[b"row"])["index"] for _, fields in client.xrange(KEYS.scores("chaos"))]
        assert (sorted(streamed) if once else sorted(set(streamed))) == list(range(BULK))


def pair(n: int) -> dict[str, str]:
    return {"prompt": f"question {n % 97} of many", "chosen": f"answer {n} " * (n % 4 + 1), "rejected": f"no {n * n}"}


async def settled(redis) -> None:
    """Nothing waits, nothing is claimed, no tokens are counted, no dead letters."""
    with redis.client() as client:
        keys = served(client)

        def left() -> dict[str, int]:
            pending = sum(client.xpending(stream, "workers")["pending"] for stream in keys.streams)
            return {key: client.xlen(key) for key in keys.streams} | {
                "open": client.hlen(keys.job_key("open")),
                "pending": pending,
            }

        await until(lambda: not any(left().values()))
        assert not client.exists(keys.job_key("tokens"))
        assert client.xlen(keys.dead) == 0
        assert endless(client) == []


def served(client) -> Keys:
    """The keys of the backbone that the queue is served with."""
    return KEYS.of(client.get(KEYS.served).decode())


async def stop_in_mid_batch(worker: Process, redis) -> None:
    """SIGSTOP at a moment when it has jobs."""

    async def stopped() -> bool:
        worker.signal(signal.SIGSTOP)
        await asyncio.sleep(0.1)  # what it had sent already has arrived
        with redis.client() as client:
            stream = served(client).streams[0]
            if client.xpending_range(stream, "workers", "-", "+", 1, consumername=worker.ready["worker"]):
                return True
        worker.signal(signal.SIGCONT)
        return False

    await until(stopped)


async def test_a_worker_killed_in_mid_batch_costs_nobody_an_answer(fleet, redis):
    api, doomed, heir = fleet.api(), fleet.worker(seconds_per_token=SLOW), fleet.worker(seconds_per_token=SLOW)
    fleet.wait_until_ready(api, doomed, heir)
    load, bulk = Load(api.url), await Bulk(api.url).begin()
    running = asyncio.create_task(load.run())
    await load.begun.wait()
    await stop_in_mid_batch(doomed, redis)
    doomed.kill()
    await running
    assert (len(load.answers), load.lost) == (PAIRS, 0)
    await load.check(api.url)
    await bulk.check(redis)
    await settled(redis)
    assert heir.events("job_taken_over")


async def test_the_jobs_of_a_killed_worker_wait_for_its_signs_of_life_and_not_for_its_claims_to_age(folder, redis):
    with Fleet(folder, redis.url, queue="chaos", presence=3, claim_idle=PATIENCE, max_deliveries=50) as fleet:
        api, doomed, heir = fleet.api(), fleet.worker(seconds_per_token=SLOW), fleet.worker(seconds_per_token=SLOW)
        fleet.wait_until_ready(api, doomed, heir)
        load = Load(api.url)
        running = asyncio.create_task(load.run())
        await load.begun.wait()
        await stop_in_mid_batch(doomed, redis)
        doomed.kill()
        await running  # nobody's claims have aged by now
        assert (len(load.answers), load.lost) == (PAIRS, 0)
        assert heir.events("job_taken_over")
        await load.check(api.url)
        await settled(redis)


async def test_an_api_replica_that_is_killed_takes_its_own_callers_along_and_no_others(fleet, redis):
    doomed, api, worker = fleet.api(), fleet.api(), fleet.worker(seconds_per_token=SLOW)
    fleet.wait_until_ready(doomed, api, worker)
    load, bulk = Load(doomed.url, api.url), await Bulk(api.url).begin()
    running = asyncio.create_task(load.run())
    await load.begun.wait()
    doomed.kill()
    await running
    assert load.lost == CALLERS // 2
    assert len(load.answers) >= PAIRS // 2
    await load.check(api.url)
    await bulk.check(redis)
    await settled(redis)


async def test_a_redis_that_is_killed_and_comes_back_costs_nobody_an_answer(fleet, redis):
    api, *workers = fleet.api(), fleet.worker(seconds_per_token=SLOW), fleet.worker(seconds_per_token=SLOW)
    fleet.wait_until_ready(api, *workers)
    load, bulk = Load(api.url), await Bulk(api.url).begin()
    with redis.client() as client:  # what is only in its buffer is lost, and there would be no job
        await until(lambda: client.info("persistence")["aof_buffer_length"] == 0)
    running = asyncio.create_task(load.run())
    await load.begun.wait()
    redis.kill()
    async with httpx.AsyncClient(base_url=api.url, timeout=PATIENCE) as client:
        await until(lambda: is_red(client))
        refused = await client.post("/margin", json={"pairs": [pair(PAIRS + BULK)]})  # one that nobody else waits for
    assert (refused.status_code, "Redis" in refused.text, "retry-after" in refused.headers) == (503, True, True)
    redis.start()
    await running
    assert (len(load.answers), load.lost) == (PAIRS, 0)
    await load.check(api.url)
    await bulk.check(redis)
    await settled(redis)


async def is_red(client: httpx.AsyncClient) -> bool:
    return (await client.get("/readyz")).status_code == 503


async def is_green(client: httpx.AsyncClient) -> bool:
    return (await client.get("/readyz")).status_code == 200


async def test_a_frozen_worker_is_relieved_and_goes_on_serving_when_it_wakes_up(fleet, redis):
    api, sleeper, heir = fleet.api(), fleet.worker(seconds_per_token=SLOW), fleet.worker(seconds_per_token=SLOW)
    fleet.wait_until_ready(api, sleeper, heir)
    load, bulk = Load(api.url), await Bulk(api.url).begin()
    running = asyncio.create_task(load.run())
    await load.begun.wait()
    await stop_in_mid_batch(sleeper, redis)
    await until(lambda: heir.events("job_taken_over"))
    await asyncio.sleep(FREEZE)
    sleeper.signal(signal.SIGCONT)
    await running
    assert (len(load.answers), load.lost) == (PAIRS, 0)
    await load.check(api.url)
    await bulk.check(redis)
    await settled(redis)
    heir.stop()
    async with httpx.AsyncClient(timeout=PATIENCE) as client:
        assert len(await load.answered(client, api.url, [1])) == 1
    assert sleeper.popen.poll() is None


async def test_a_job_that_crashes_workers_is_given_up_and_its_neighbours_are_answered(folder, redis):
    poison = token_ids(folder, "boom boom boom")
    pairs = [pair(n) for n in range(10)]
    pairs[4] = {"prompt": "question", "chosen": "boom boom boom", "rejected": "fine"}
    with Fleet(
        folder, redis.url, queue="chaos", presence=30, claim_idle=9
    ) as fleet:  # a worker that is only slow has not crashed
        api, *workers = fleet.api(), *(fleet.worker(poison=poison) for _ in range(4))
        fleet.wait_until_ready(api, *workers)
        async with httpx.AsyncClient(timeout=2 * PATIENCE) as client:
            asking = asyncio.create_task(client.post(api.url + "/margin", json={"pairs": pairs}))
            await hasten(redis, workers, deaths=3)
            together = (await asking).json()["margins"]
            alone = [(await Load().answered(client, api.url, [n]))[0] for n in (*range(4), *range(5, 10))]
        assert "3 workers ended" in together[4]["error"]["message"]
        assert [m["margin"] for m in together[:4] + together[5:]] == pytest.approx(alone, rel=1e-4)
        assert sorted(w.popen.poll() or 0 for w in workers) == [0, 139, 139, 139]
        with redis.client() as client:
            assert client.xlen(KEYS.dead) == 1
            client.delete(KEYS.dead)
        await settled(redis)


def token_ids(folder, text: str) -> str:
    """As ``Fleet.worker`` takes poison."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model")
    return ",".join(map(str, tokenizer(text, add_special_tokens=False)["input_ids"]))


async def hasten(redis, workers: Sequence[Process], *, deaths: int) -> None:
    """What workers that die had claimed is taken over without waiting."""
    left = list(workers)
    for _ in range(deaths):
        dead = await until(lambda: next((worker for worker in left if worker.popen.poll() is not None), None))
        left.remove(dead)
        with redis.client() as client:
            age(redis, dead.ready["worker"], streams=served(client).streams)


async def test_a_full_and_a_frozen_redis_are_503_and_everything_recovers_without_a_restart(fleet, redis):
    api, worker = fleet.api(), fleet.worker()
    fleet.wait_until_ready(api, worker)
    load = Load()
    async with httpx.AsyncClient(base_url=api.url, timeout=PATIENCE) as client:
        with redis.client() as direct:
            direct.config_set("maxmemory", 1)
            full = await client.post("/margin", json={"pairs": [pair(1)]})
            direct.config_set("maxmemory", 0)
        assert (full.status_code, "Redis is full" in full.text, "retry-after" in full.headers) == (503, True, True)
        assert len(await load.answered(client, "", [1])) == 1
        redis.signal(signal.SIGSTOP)
        frozen = await client.post("/margin", json={"pairs": [pair(2)]})
        assert (frozen.status_code, "can't be reached" in frozen.text, "retry-after" in frozen.headers) == (
            503,
            True,
            True,
        )
        assert await is_red(client)
        redis.signal(signal.SIGCONT)
        await until(lambda: is_green(client))
        assert len(await load.answered(client, "", [2])) == 1
    await settled(redis)


async def test_workers_of_two_weights_never_answer_as_one_service(folder, redis, tmp_path):
    """As it was found: one request was answered 61 : 59 by two workers of the same name and other weights."""
    write_model(tmp_path, seed=1)
    pairs = [pair(n) for n in range(1200 if FULL else 120)]
    settings = {"queue": "chaos", "presence": 30, "claim_idle": 9}  # a worker looks for others of its kind every 3 s
    with Fleet(folder, redis.url, **settings) as fleet, Fleet(tmp_path, redis.url, **settings) as others:
        api, worker = fleet.api(), fleet.worker()
        fleet.wait_until_ready(worker, api)
        stranger = others.worker()
        others.wait_until_serving(stranger)
        async with httpx.AsyncClient(timeout=2 * PATIENCE) as client:

            async def refused() -> str:
                answer = await client.get(stranger.url + "/readyz")
                message = str(answer.json().get("error", {}).get("message", ""))
                return message if "other weights" in message else ""

            assert (await until(refused)).count("sha256:") == 2
            alone = await Load().posted(client, api.url, pairs)
            assert await computed(client, stranger) == 0
            assert (await client.get(api.url + "/readyz")).status_code == 200
            worker.stop()  # the last one of its weights: now the other one serves
            others.wait_until_ready(stranger, api)
            other = await Load().posted(client, api.url, pairs)
            assert await computed(client, stranger) > 0
        assert [row["error"] for row in (*alone, *other)] == [None] * (2 * len(pairs))
        await settled(redis)


async def computed(client: httpx.AsyncClient, worker: Process) -> float:
    """Tokens."""
    return await metric(client, worker, "inward_computed_tokens_total")


async def metric(client: httpx.AsyncClient, worker: Process, name: str) -> float:
    lines = (await client.get(worker.url + "/metrics")).text.splitlines()
    return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])


async def test_bad_bulk_rows_end_no_bulk_work_anywhere(fleet, redis):
    """As it was found: one of these rows ended the bulk work of every replica, with ``/readyz`` green."""
    bad = [
        b'{"prompt": "q", "chosen": "\\ud800", "rejected": "no"}',
        b'{"prompt": "q", "chosen": "yes", "rejected": NaN}',
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": "q", "chosen": "yes", "rejected": "no", "score": 1e999}',
    ]
    apis, worker = [fleet.api(), fleet.api()], fleet.worker()
    fleet.wait_until_ready(*apis, worker)
    good = [json.dumps(pair(n)).encode() for n in range(BULK // 2)]
    rows = [row for one in good for row in (one, *bad[:1])] + bad * 3
    async with httpx.AsyncClient(base_url=apis[0].url, timeout=PATIENCE) as client:
        for _ in range(3):
            answer = await client.post("/jobs?kind=margin", content=b"\n".join(rows), headers=JSONL)
            results = await finished(client, answer.json()["id"])
            assert [bool(row["error"]) for row in results] == [row in bad for row in rows]
    for api in apis:
        async with httpx.AsyncClient(base_url=api.url, timeout=PATIENCE) as client:
            assert await is_green(client)
        assert not api.events("task_failed")
    await (await Bulk(apis[1].url).begin()).check(redis)
    await settled(redis)


async def test_a_chunk_that_takes_longer_than_a_request_may_is_done_in_parts_and_ends(folder, redis):
    """As it was found: such a chunk was computed again and again for ever."""
    rows = [pair(n) for n in range(64 if FULL else 8)]
    rows[3] = {"prompt": "question", "chosen": "far too long an answer " * 20, "rejected": "no"}
    with Fleet(folder, redis.url, queue="chaos", timeout=3) as fleet:
        api, worker = fleet.api(), fleet.worker(seconds_per_token=1e-2)
        fleet.wait_until_ready(api, worker)
        async with httpx.AsyncClient(base_url=api.url, timeout=PATIENCE) as client:
            body = "\n".join(map(json.dumps, rows))
            answer = await client.post("/jobs?kind=margin", content=body, headers=JSONL)
            results = await finished(client, answer.json()["id"])
        codes = [(row["error"] or {}).get("code") for row in results]
        assert codes == [None] * 3 + ["deadline_exceeded"] + [None] * (len(rows) - 4)
        await settled(redis)


async def finished(client: httpx.AsyncClient, job: str) -> list[dict[str, object]]:
    """The results of a bulk job, once it is done."""

    async def done() -> bool:
        return bool((await client.get(f"/jobs/{job}")).json()["state"] == "done")

    await until(done)
    return [json.loads(line) for line in (await client.get(f"/jobs/{job}/results")).text.splitlines()]


async def test_a_worker_whose_device_hangs_ends_itself_and_others_have_its_jobs(folder, redis):
    with Fleet(folder, redis.url, queue="chaos", presence=30, claim_idle=30) as fleet:
        api, hung = fleet.api(), fleet.worker(poison=token_ids(folder, "boom boom boom"), hangs=True)
        fleet.wait_until_ready(api, hung)
        async with httpx.AsyncClient(timeout=2 * PATIENCE) as client:
            pairs = [pair(1), {"prompt": "question", "chosen": "boom boom boom", "rejected": "fine"}]
            asking = asyncio.create_task(Load().posted(client, api.url, pairs))
            await until(lambda: hung.popen.poll() is not None)
            heir = fleet.worker()
            fleet.wait_until_ready(heir)
            margins = await asking
        assert (hung.popen.poll(), len(margins), [m["error"] for m in margins]) == (1, 2, [None, None])
        assert "no progress" in str(hung.events("engine_dead")[0]["reason"])
        assert hung.events("ended_at_once")
        await settled(redis)


async def test_a_drawing_whose_caller_left_keeps_nobody_waiting(folder, redis):
    """As it was found: it was drawn to its end, and until then others got a 504 from a worker that was ready."""
    drawing = {"prompt": "question", "n": 64, "sampling": {"max_tokens": 64}}
    item = {"prompt": "question", "response": "answer"}
    with Fleet(folder, redis.url, queue="chaos", timeout=PATIENCE) as fleet:
        api, worker = fleet.api(), fleet.worker(seconds_per_token=0.2)  # a quarter of an hour for all of them
        fleet.wait_until_ready(api, worker)
        async with httpx.AsyncClient(base_url=api.url, timeout=2 * PATIENCE) as client:
            for _ in range(3 if FULL else 1):
                asking = asyncio.create_task(client.post("/rerank", json=drawing))

                async def begun() -> bool:
                    return await metric(client, worker, "inward_in_flight_jobs") > 0

                await until(begun)
                asking.cancel()
                answer = await client.post("/score", json={"items": [item]})
                assert (answer.status_code, answer.json()["scores"][0]["error"]) == (200, None)
            assert (await client.get(worker.url + "/readyz")).status_code == 200
        await settled(redis)


@pytest.mark.parametrize("seed", [{"seed": 5}, {}], ids=["seeded", ""])
async def test_an_answer_whose_worker_dies_while_it_is_told_goes_on_or_says_that_it_can_not(folder, redis, seed):
    ask = {"model": "any", "prompt": "question", "max_tokens": 200, **seed}
    with Fleet(folder, redis.url, queue="chaos", presence=30, claim_idle=IDLE) as fleet:
        api, first = fleet.api(), fleet.worker(seconds_per_token=0.1)
        fleet.wait_until_ready(api, first)
        async with httpx.AsyncClient(base_url=api.url, timeout=2 * PATIENCE) as client:
            # the fake backbone's drawings without a seed differ by their number
            await client.post("/v1/completions", json={**ask, "max_tokens": 1})
            told: list[dict[str, Any]] = []
            telling = asyncio.create_task(told_to(client, {**ask, "stream": True}, told))
            await until(lambda: len(text_of(told)) > 8)
            first.signal(signal.SIGSTOP)
            heir = fleet.worker()
            fleet.wait_until_ready(heir)
            await telling
            first.kill()
            whole = (await client.post("/v1/completions", json=ask)).json()["choices"][0]["text"]
        if seed:
            assert text_of(told) == whole
            assert len(told) > 3
        else:
            assert "drew another" in told[-1]["error"]["message"]
        await settled(redis)


async def told_to(client: httpx.AsyncClient, ask: dict[str, Any], events: list[dict[str, Any]]) -> None:
    """``events`` grows as a stream brings them."""
    async with client.stream("POST", "/v1/completions", json=ask) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                events.append(json.loads(line.removeprefix("data: ")))


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(event["choices"][0]["text"] for event in events if "choices" in event)


@pytest.mark.skipif(not FULL, reason="a failover under load is left to make chaos (INWARD_CHAOS=full)")
async def test_a_failover_costs_nobody_an_answer(folder, own_redis, tmp_path):
    master, heir = own_redis(), own_redis()
    with heir.client() as client:
        client.replicaof("127.0.0.1", master.port)
    sentinel = Sentinel(tmp_path, master).start()
    try:
        await until(lambda: sentinel.replicas() == 1)
        with Fleet(folder, sentinel.url, queue="chaos", presence=10, claim_idle=IDLE) as fleet:
            api, *workers = fleet.api(), fleet.worker(seconds_per_token=SLOW), fleet.worker(seconds_per_token=SLOW)
            fleet.wait_until_ready(api, *workers)
            load, bulk = Load(api.url), await Bulk(api.url).begin()
            running = asyncio.create_task(load.run())
            await load.begun.wait()
            master.kill()
            sentinel.be_quick()
            await running
            assert (len(load.answers), load.lost) == (PAIRS, 0)
            await load.check(api.url)
            await bulk.check(heir, once=False)  # the last moment before a failover may be lost, and is done again
            await settled(heir)
    finally:
        sentinel.kill()
