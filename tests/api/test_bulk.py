"""Bulk jobs: the store against a real Redis, the runner through the real routes, the routes as a caller sees them."""

import asyncio
import hashlib
import json
import tracemalloc
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from inward import metrics
from inward.api.app import create_app
from inward.api.bulk import TRIES, BulkRunner
from inward.api.routes.jobs import _lines
from inward.errors import DeadlineExceeded, NotFound, Overloaded, TooLarge, Unavailable
from inward.stores import jobs
from inward.stores.connection import Connection
from inward.stores.jobs import ROWS, BulkStore
from support.fake_services import FakeServices, error
from support.queues import KEYS, age, endless
from support.waiting import PATIENCE, until

JSONL = {"content-type": "application/x-ndjson"}


def pairs(n):
    return [{"prompt": "question", "chosen": "a" * (i % 7 + 1), "rejected": "b" * (i % 3 + 1)} for i in range(n)]


def lines(rows):
    return "\n".join(json.dumps(row) for row in rows).encode()


async def each(rows):
    for row in rows:
        yield row


@asynccontextmanager
async def opened(redis_server, **options):
    """A store in Redis and a house of fakes whose routes use it."""
    connection = Connection(redis_server.url, timeout=PATIENCE)
    api = FakeServices(**options)
    api.store = BulkStore(connection, KEYS, keep=PATIENCE, idle=PATIENCE)
    object.__setattr__(api.services, "jobs", api.store)
    yield api
    await connection.close()


@asynccontextmanager
async def running(api, **options):
    task = asyncio.create_task(BulkRunner(api.store, api.services, **{"idle": PATIENCE, **options}).run())
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def finished(api, job_id):
    async def ended():
        job = (await api.get(f"/jobs/{job_id}")).json()
        return job if job["state"] != "running" else None

    return await until(ended)


async def results(api, job_id):
    answer = await api.get(f"/jobs/{job_id}/results")
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


async def test_every_row_gets_what_it_gets_in_a_request_in_its_place(redis_server):
    rows = pairs(3 * ROWS + 5)
    async with opened(redis_server) as api, running(api):
        created = await api.post("/jobs?kind=margin", lines(rows), headers=JSONL)
        assert (created.status_code, created.json()["state"], created.json()["rows"]) == (201, "running", len(rows))
        job = await finished(api, created.json()["id"])
        assert (job["state"], job["done"]) == ("done", len(rows))
        got = await results(api, job["id"])
        expected = (await api.post("/margin", {"pairs": rows[:50]})).json()
    assert [r["index"] for r in got] == list(range(len(rows)))
    assert [r["margin"] for r in got[:50]] == [m["margin"] for m in expected["margins"]]
    assert got[0]["head"] == expected["head"]


async def test_what_a_bulk_job_costs_is_told_of_the_key_that_sent_it_and_stops_nobody(redis_server, caplog, tmp_path):
    keys = [{"name": "bulky", "sha256": hashlib.sha256(b"a-key").hexdigest(), "quota": 1}]
    (tmp_path / "keys").write_text(f"keys: {json.dumps(keys)}")
    caplog.set_level("INFO", logger="inward.audit")
    key = {"authorization": "Bearer a-key"}
    async with opened(redis_server, keys_file=tmp_path / "keys") as api, running(api):
        created = (await api.post("/jobs?kind=margin", lines(pairs(ROWS + 5)), headers=JSONL | key)).json()
        assert "caller" not in created

        async def done():
            return (await api.get(f"/jobs/{created['id']}", headers=key)).json()["state"] == "done"

        await until(done)
    told = [record.fields for record in caplog.records if record.name == "inward.audit"]
    assert [(one["key"], one["job"], one["chunk"]) for one in told] == [("bulky", created["id"], n) for n in (0, 1)]
    assert sum(one["tokens"] for one in told) == sum(g.tokens for call in api.intake.calls for g in call["groups"])


async def test_rows_that_are_wrong_have_an_error_and_harm_no_others(redis_server):
    bad = {
        b"not json": (None, "not JSON"),
        b"[1]": (None, "not a JSON object"),
        b'{"prompt": "x", "chosen": "y", "unknown": 1}': ("rejected", "missing"),
        b'{"prompt": "x", "chosen": "\\ud800", "rejected": "y"}': ("chosen", "surrogate"),
        b'{"prompt": "x", "chosen": "y", "rejected": NaN}': (None, "NaN is not a JSON number"),
        b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}": (None, "nested too deeply"),
        b'{"prompt": "x", "chosen": "y", "rejected": 1e999}': ("rejected", "must be a string"),
    }
    body = b"\n".join([lines(pairs(2)), *bad, lines(pairs(1))])
    async with opened(redis_server) as api, running(api):
        created = await api.post("/jobs?kind=margin&append_to=trainer", body, headers=JSONL)
        got = await results(api, (await finished(api, created.json()["id"]))["id"])
        with redis_server.client() as client:
            streamed = [json.loads(fields[b"row"])["index"] for _, fields in client.xrange(KEYS.scores("trainer"))]
    assert [bool(r.get("error")) for r in got] == [False] * 2 + [True] * len(bad) + [False]
    for row, (param, said) in zip(got[2:-1], bad.values(), strict=True):
        assert (row["error"]["param"], said in row["error"]["message"]) == (param, True), row
    assert streamed == [0, 1, len(got) - 1]


def response_of(call):
    """The longest response of each group of a call."""
    return [max(map(len, group.responses_ids)) for group in call]


async def test_whatever_scoring_raises_is_the_error_of_the_row_to_blame_alone(redis_server):
    rows = [{"prompt": "a", "response": "b" * (i % 5 + 1)} for i in range(ROWS + 10)]
    rows[3]["response"] = rows[ROWS + 2]["response"] = "c" * 50

    async with opened(redis_server) as api, running(api):
        score = api.intake.score

        async def failing(groups, **options):
            if 50 in response_of(groups):
                raise KeyError("what somebody wrote")
            return await score(groups, **options)

        api.intake.score = failing
        created = await api.post("/jobs?kind=score", lines(rows), headers=JSONL)
        got = await results(api, (await finished(api, created.json()["id"]))["id"])
    assert [i for i, r in enumerate(got) if r["error"]] == [3, ROWS + 2]
    assert (got[3]["error"]["code"], got[3]["error"]["message"]) == (
        "internal_error",
        "this row could not be scored (KeyError)",
    )
    assert [r["score"] for r in got if not r["error"]] == [
        float(len(r["response"])) for r in rows if "c" not in r["response"]
    ]


async def test_rows_that_take_too_long_together_are_done_in_parts_and_one_that_is_too_slow_ends(redis_server):
    rows = [{"prompt": "a", "response": "b" * (i % 5 + 1)} for i in range(20)]
    rows[7]["response"] = "c" * 50
    calls = []

    async with opened(redis_server) as api, running(api):
        score = api.intake.score

        async def slow(groups, **options):
            calls.append(response_of(groups))
            if len(groups) > 5 or 50 in calls[-1]:
                raise DeadlineExceeded("not done in time")
            return await score(groups, **options)

        api.intake.score = slow
        created = await api.post("/jobs?kind=score", lines(rows), headers=JSONL)
        got = await results(api, (await finished(api, created.json()["id"]))["id"])
    assert [i for i, r in enumerate(got) if r["error"]] == [7]
    assert got[7]["error"]["code"] == "deadline_exceeded"
    assert calls.count([50]) == TRIES
    assert len(calls) < 20


async def test_a_chunk_that_ends_replicas_is_given_up_and_the_job_ends(redis_server):
    async with opened(redis_server) as api:
        job = await api.store.create(
            "margin", each(json.dumps(p) for p in pairs(ROWS + 3)), head="harmless", scores=None
        )
        for i in range(3):
            chunk = await until(lambda i=i: api.store.take(f"dead {i}"))
            assert (chunk.number, chunk.deliveries) == (0, i + 1)
            age(redis_server, f"dead {i}", streams=[KEYS.chunks], group="replicas")
        async with running(api, max_deliveries=3):
            assert (await finished(api, job.id))["done"] == ROWS + 3
        got = await results(api, job.id)
    assert ["3 replicas ended" in (r["error"] or {}).get("message", "") for r in got] == [True] * ROWS + [False] * 3


async def test_a_replica_that_stops_gives_its_chunk_back_as_if_it_had_never_had_it(redis_server):
    async with opened(redis_server) as api:
        api.intake.hold = asyncio.Event()
        job = await api.store.create("margin", each(json.dumps(p) for p in pairs(3)), head="harmless", scores=None)
        async with running(api):
            await api.intake.started.wait()
        chunk = await until(lambda: api.store.take("heir"))
        assert (chunk.job.id, chunk.deliveries) == (job.id, 1)


async def test_rows_that_redis_has_lost_are_errors_and_the_job_ends(redis_server):
    async with opened(redis_server) as api:
        job = await api.store.create(
            "margin", each(json.dumps(p) for p in pairs(ROWS + 3)), head="harmless", scores=None
        )
        with redis_server.client() as client:
            client.hdel(KEYS.bulk(job.id, "rows"), 0)
        async with running(api):
            assert (await finished(api, job.id))["done"] == ROWS + 3
        assert [bool(r["error"]) for r in await results(api, job.id)] == [True] * ROWS + [False] * 3


async def test_a_chunk_that_another_replica_has_finished_meanwhile_is_nobodys(redis_server):
    async with opened(redis_server) as api:
        job = await api.store.create(
            "margin", each(json.dumps(p) for p in pairs(ROWS + 3)), head="harmless", scores=None
        )
        chunk = await until(lambda: api.store.take("slow"))
        await api.store.finish(chunk, [{}] * ROWS, [])
        assert await api.store._chunk(chunk.entry, {b"job": job.id.encode(), b"chunk": b"0"}) is None


@pytest.mark.parametrize(("numbers", "done"), [([], 0), ([0], ROWS), ([1], 3), ([0, 1], ROWS + 3)])
async def test_done_counts_the_rows_of_the_last_chunk_as_they_are(redis_server, numbers, done):
    async with opened(redis_server) as api:
        job = await api.store.create(
            "margin", each(json.dumps(p) for p in pairs(ROWS + 3)), head="harmless", scores=None
        )
        chunks = [await until(lambda: api.store.take("me")) for _ in range(2)]
        for number in numbers:
            await api.store.finish(chunks[number], [{}] * chunks[number].size, [])
        assert (await api.store.get(job.id)).done == done


async def test_rows_that_cannot_be_read_any_more_are_errors_and_the_job_ends(redis_server):
    async with opened(redis_server) as api:
        job = await api.store.create("margin", each(json.dumps(p) for p in pairs(3)), head="harmless", scores=None)
        with redis_server.client() as client:
            client.hset(KEYS.bulk(job.id, "rows"), 0, b"damaged")
            client.xadd(KEYS.chunks, {"of": "nobody"})
        async with running(api):
            await finished(api, job.id)
        assert [bool(r["error"]) for r in await results(api, job.id)] == [True] * 3
        with redis_server.client() as client:
            await until(lambda: client.xlen(KEYS.chunks) == 0)


async def test_bulk_rows_are_no_requests(redis_server):
    def requests():
        return metrics.REGISTRY.get_sample_value("inward_requests_total", {"route": "/margin", "code": "200"}) or 0

    async with opened(redis_server) as api, running(api):
        before = requests()
        created = await api.post("/jobs?kind=margin", lines(pairs(3)), headers=JSONL)
        await finished(api, created.json()["id"])
        assert requests() == before


async def test_everything_of_a_job_has_an_end(redis_server):
    async with opened(redis_server) as api:
        job = await api.store.create("margin", each(json.dumps(p) for p in pairs(3)), head="harmless", scores="t")
        with redis_server.client() as client:
            assert endless(client) == []
            async with running(api):
                await finished(api, job.id)
            assert endless(client) == []


async def test_a_chunk_of_a_replica_that_died_is_done_by_another_one_and_stored_once(redis_server):
    async with opened(redis_server) as api:
        job = await api.store.create(
            "margin", each(json.dumps(p) for p in pairs(2 * ROWS)), head="harmless", scores="trainer"
        )
        lost = await until(lambda: api.store.take("dead"))
        age(redis_server, "dead", streams=[KEYS.chunks], group="replicas")
        async with running(api):
            assert (await finished(api, job.id))["done"] == 2 * ROWS
        await api.store.finish(lost, [{"index": 0, "margin": 99.0}] * ROWS, [{"late": True}] * ROWS)
        assert 99.0 not in [r["margin"] for r in await results(api, job.id)]
        with redis_server.client() as client:
            stream = [json.loads(fields[b"row"]) for _, fields in client.xrange(KEYS.scores("trainer"))]
            assert client.xlen(KEYS.chunks) == 0
            assert client.xpending(KEYS.chunks, "replicas")["pending"] == 0
    assert sorted(row["index"] for row in stream) == list(range(2 * ROWS))
    assert {"prompt", "chosen", "rejected", "margin", "head"} <= set(stream[0])


async def test_a_job_waits_while_the_house_is_overloaded(redis_server):
    async with opened(redis_server) as api, running(api):
        api.intake.error = Overloaded("full", retry_after=1)
        job_id = (await api.post("/jobs?kind=score", lines([{"prompt": "a", "response": "b"}]), headers=JSONL)).json()[
            "id"
        ]
        await api.intake.started.wait()
        early = await api.get(f"/jobs/{job_id}/results")
        assert (early.status_code, "0 of 1 rows" in error(early)["message"]) == (409, True)
        api.intake.error = None
        await finished(api, job_id)
        assert (await results(api, job_id))[0]["score"] == 1.0


async def test_a_cancelled_job_is_not_worked_off_and_leaves_nothing(redis_server):
    async with opened(redis_server) as api:
        job_id = (await api.post("/jobs?kind=margin", lines(pairs(ROWS * 2)), headers=JSONL)).json()["id"]
        assert (await api.post(f"/jobs/{job_id}/cancel", b"")).json()["state"] == "cancelled"
        with redis_server.client() as client:
            async with running(api):
                await until(lambda: client.xlen(KEYS.chunks) == 0)
            assert client.exists(KEYS.bulk(job_id, "rows")) == 0
        assert api.intake.calls == []
        assert (await api.get(f"/jobs/{job_id}/results")).status_code == 409


@pytest.mark.parametrize(
    ("path", "body", "headers", "status"),
    [
        ("/jobs?kind=margin", b"", JSONL, 422),
        ("/jobs?kind=margin", b"{}", {"content-type": "text/plain"}, 400),
        ("/jobs?kind=margin", b"\xff", JSONL, 400),
        ("/jobs?kind=other", b"{}", JSONL, 422),
        ("/jobs", b"{}", JSONL, 422),
        ("/jobs?kind=margin&head=nope", b"{}", JSONL, 404),
        ("/jobs?kind=margin&append_to=a%20b", b"{}", JSONL, 422),
        ("/jobs?kind=margin&scores=dpo", b"{}", JSONL, 422),
    ],
)
async def test_what_is_no_job_is_refused(redis_server, path, body, headers, status):
    async with opened(redis_server) as api:
        answer = await api.post(path, body, headers=headers)
        assert (answer.status_code, bool(error(answer))) == (status, True)


async def test_unknown_jobs_are_404_and_so_are_all_where_there_is_no_redis(redis_server):
    async with opened(redis_server) as api:
        assert (await api.get(f"/jobs/{'0' * 32}")).status_code == 404
        with pytest.raises(NotFound):
            await api.store.cancel("0" * 32)
    answer = await FakeServices().get(f"/jobs/{'0' * 32}")
    assert (answer.status_code, "need a Redis" in error(answer)["message"]) == (404, True)


async def test_an_upload_has_a_limit_of_its_own(redis_server):
    async with opened(redis_server) as api:
        rows = lines([{"prompt": "x" * 1000, "response": "y"}] * 1200)
        assert (await api.post("/score", rows)).status_code == 413
        assert (await api.post("/jobs?kind=score", rows, headers=JSONL)).status_code == 201


async def test_an_upload_goes_to_redis_as_it_comes_and_is_not_held_in_memory(redis_server):
    row = json.dumps({"prompt": "x" * 1000, "response": "y"}).encode() + b"\n"
    piece, pieces = row * 640, 30

    async with opened(redis_server) as api:
        tracemalloc.start()
        try:
            answer = await api.post("/jobs?kind=score", each(piece for _ in range(pieces)), headers=JSONL)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert answer.json()["rows"] == 640 * pieces
        assert len(piece) * pieces > 15 * 2**20 > 3 * peak
        with redis_server.client() as client:
            assert client.hlen(KEYS.bulk(answer.json()["id"], "rows")) == 640 * pieces // ROWS


async def test_rows_are_whole_wherever_the_upload_is_cut_into_pieces(redis_server):
    rows = [{"prompt": "wie schön — 你好", "response": "é" * n} for n in range(1, 5)]
    body = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    async with opened(redis_server) as api:
        answer = await api.post("/jobs?kind=score", each(body[i : i + 1] for i in range(len(body))), headers=JSONL)
        chunk = await until(lambda: api.store.take("me"))
    assert [json.loads(line) for line in chunk.rows] == rows
    assert answer.json()["rows"] == len(rows)


async def test_a_line_that_comes_in_many_pieces_is_looked_at_once():
    looked = 0

    class Piece(bytes):
        def split(self, sep):
            nonlocal looked
            looked += len(self)
            return super().split(sep)

    body = b"x" * 20_000 + b"\ny\n\n" + b"z" * 300
    pieces = [Piece(body[i : i + 7]) for i in range(0, len(body), 7)]
    assert [line async for line in _lines(each(pieces), 20_000)] == ["x" * 20_000, "y", "z" * 300]
    assert looked == len(body)
    with pytest.raises(TooLarge, match="line 1 "):
        _ = [line async for line in _lines(each(pieces), 19_999)]


@pytest.mark.parametrize("ending", ["disconnect", "not utf-8", "too large", "a row too large"])
async def test_an_upload_that_breaks_off_leaves_nothing_behind(redis_server, ending):
    async with opened(redis_server) as api:
        limits = replace(api.services.limits, upload_bytes=100_000, body_bytes=50_000)
        app = create_app(replace(api.services, limits=limits))
        last = {
            "disconnect": {"type": "http.disconnect"},
            "not utf-8": {"type": "http.request", "body": b"\xff\n", "more_body": True},
            "too large": {"type": "http.request", "body": lines(pairs(2000)), "more_body": True},
            "a row too large": {"type": "http.request", "body": b"x" * 60_000, "more_body": True},
        }[ending]
        messages = iter([{"type": "http.request", "body": lines(pairs(3 * ROWS)) + b"\n", "more_body": True}, last])
        sent, stored = [], []

        async def receive():
            with redis_server.client() as client:
                stored.append(client.keys(KEYS.bulk("*")))
            return next(messages)

        async def send(message):
            sent.append(message)

        headers = [(b"content-type", JSONL["content-type"].encode())]
        scope = {"type": "http", "method": "POST", "path": "/jobs", "query_string": b"kind=margin", "headers": headers}
        await app(scope, receive, send)
        assert [len(keys) for keys in stored] == [0, 1]
        with redis_server.client() as client:
            assert client.keys(KEYS.bulk("*")) == []
            assert client.xlen(KEYS.chunks) == 0
    status = {"disconnect": [], "not utf-8": [400], "too large": [413], "a row too large": [413]}[ending]
    assert [m["status"] for m in sent if m["type"] == "http.response.start"] == status


async def test_the_rows_of_an_upload_are_kept_as_long_as_it_is_open(redis_server, monkeypatch):
    monkeypatch.setattr(jobs, "RENEW_S", 0.01)
    async with opened(redis_server) as api:
        with redis_server.client() as client:

            async def pausing():
                yield lines(pairs(ROWS)) + b"\n"
                (rows,) = client.keys(KEYS.bulk("*"))
                client.expire(rows, jobs.UPLOAD_S // 2)
                await until(lambda: client.ttl(rows) > jobs.UPLOAD_S // 2)
                yield lines(pairs(3))

            answer = await api.post("/jobs?kind=margin", pausing(), headers=JSONL)
            assert (answer.status_code, answer.json()["rows"]) == (201, ROWS + 3)
            kept = client.ttl(KEYS.bulk(answer.json()["id"], "rows"))
            await api.store._redis.script(
                jobs.RENEW, [KEYS.bulk(answer.json()["id"], *part) for part in ((), ("rows",))], [jobs.UPLOAD_S * 9]
            )
            assert client.ttl(KEYS.bulk(answer.json()["id"], "rows")) <= kept


async def test_an_upload_of_which_redis_has_lost_rows_is_refused_and_leaves_nothing_behind(redis_server):
    async with opened(redis_server) as api:
        with redis_server.client() as client:

            async def losing():
                yield lines(pairs(ROWS)) + b"\n"
                client.delete(*client.keys(KEYS.bulk("*")))
                yield lines(pairs(3))

            answer = await api.post("/jobs?kind=margin", losing(), headers=JSONL)
            assert (answer.status_code, "send it again" in error(answer)["message"]) == (Unavailable.status, True)
            assert (client.keys(KEYS.bulk("*")), client.xlen(KEYS.chunks)) == ([], 0)


async def test_a_job_that_redis_is_told_twice_to_start_is_started_once(redis_server, monkeypatch):
    async with opened(redis_server) as api:
        script = api.store._redis.script

        async def twice(source, keys, args):
            if source == jobs.START:  # the connection was cut before the answer; a replica was quick meanwhile
                await script(source, keys, args)
                await api.store.finish(await until(lambda: api.store.take("quick")), [{}] * ROWS, [])
            return await script(source, keys, args)

        monkeypatch.setattr(api.store._redis, "script", twice)
        job = await api.store.create(
            "margin", each(json.dumps(p) for p in pairs(ROWS + 3)), head="harmless", scores=None
        )
        assert (job.state, job.done) == ("running", ROWS)
        with redis_server.client() as client:
            assert (client.xlen(KEYS.chunks), client.hlen(KEYS.bulk(job.id, "rows"))) == (1, 1)


async def test_an_upload_that_is_sent_again_with_its_key_is_the_same_job(redis_server):
    async with opened(redis_server) as api:
        headers = {**JSONL, "idempotency-key": "k"}
        first, again = [await api.post("/jobs?kind=margin", lines(pairs(3)), headers=headers) for _ in range(2)]
        assert (first.json()["id"], again.headers["idempotency-replayed"]) == (again.json()["id"], "true")
        assert (await api.post("/jobs?kind=score", lines(pairs(3)), headers=headers)).status_code == 422
