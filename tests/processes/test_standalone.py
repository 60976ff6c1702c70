"""``inward serve`` as its users meet it: a process, a port, real requests."""

import asyncio
import json
import os
import socket
import subprocess
import sys

import httpx
import numpy as np
import pytest

from support.real_data import rows
from support.serving import serve, write_model
from support.waiting import PATIENCE, until, wait_until

WORDS = ("harbour quiet morning boats lock canal step help safer seven birds wire crows "
         "starlings tallest tree coast redwood").split()  # fmt: skip

ANSWERED = 'inward_requests_total{code="200",route="/margin"}'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    write_model(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    with serve(folder, "--dtype", "float32") as served:
        yield served


@pytest.fixture(scope="module")
def tiny_batches(folder):
    """One that has much to do for long, and says all that it does."""
    with serve(folder, "--token-budget", "64", "--log-level", "debug") as served:
        yield served


async def value(client, series):
    """Of a series of /metrics; 0 where it is not there yet."""
    lines = (await client.get("/metrics")).text.splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(series)), 0.0)


def pairs(n, seed=0, words=20):
    rng = np.random.default_rng(seed)

    def text():
        return " ".join(rng.choice(WORDS, rng.integers(1, words)))

    return [{"prompt": text(), "chosen": text(), "rejected": text()} for _ in range(n)]


async def test_32_callers_get_every_answer_in_order_and_the_same_as_one_by_one(server):
    work = [pairs(6, seed) for seed in range(32)]
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as client:
        answers = await asyncio.gather(*(client.post("/margin", json={"pairs": p}) for p in work))
        for sent, answer in zip(work, answers, strict=True):
            assert answer.status_code == 200
            together = [m["margin"] for m in answer.json()["margins"]]
            alone = [
                (await client.post("/margin", json={"pairs": [pair]})).json()["margins"][0]["margin"] for pair in sent
            ]
            assert together == pytest.approx(alone, rel=1e-4, abs=1e-4)


async def test_answers_are_streamed_as_they_are_drawn_and_who_hangs_up_is_not_drawn_for(server):
    ask = {"prompt": "quiet harbour", "n": 3, "sampling": {"max_tokens": 12, "seed": 5}, "stream": True}
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as client:
        async with client.stream("POST", "/rerank", json=ask) as response:
            lines = [line async for line in response.aiter_lines()]
        names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
        assert names == ["sample"] * 3 + ["result"]
        assert [line for line in lines if line][-1] == "data: [DONE]"
        *samples, result = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        assert sorted(sample["index"] for sample in samples) == [0, 1, 2]
        assert result["best"]["score"] == max(sample["score"] for sample in samples)
        async with client.stream("POST", "/rerank", json={**ask, "n": 64}) as response:
            async for _ in response.aiter_lines():
                break  # and hang up
        async with asyncio.timeout(PATIENCE):
            while "inward_queue_tokens 0.0" not in (await client.get("/metrics")).text:
                await asyncio.sleep(0.05)


async def test_scores_come_back_beside_long_drawings_which_end_when_nobody_waits_for_them(server):
    draw = {"prompt": "quiet harbour", "n": 64, "sampling": {"max_tokens": 100, "temperature": 3.0}}
    score = {"items": [{"prompt": "tall redwood", "response": "on the coast"}]}
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as client:
        alone = (await client.post("/score", json=score)).json()["scores"]
        drawings = [asyncio.create_task(client.post("/rerank", json=draw)) for _ in range(8)]
        await until(lambda: value(client, "inward_in_flight_jobs"))
        beside = [(await client.post("/score", json=score)).json()["scores"] for _ in range(3)]
        assert not any(drawing.done() for drawing in drawings)
        for drawing in drawings:
            drawing.cancel()
        await asyncio.gather(*drawings, return_exceptions=True)

        async def idle():
            return await value(client, "inward_in_flight_jobs") == 0

        await until(idle)
        assert (await client.post("/score", json=score)).json()["scores"][0]["score"] == pytest.approx(
            alone[0]["score"]
        )
    assert [one[0]["score"] for one in beside] == [pytest.approx(alone[0]["score"])] * 3


async def test_a_drawn_answer_scores_in_score_what_it_scores_in_rerank(server):
    ask = {"prompt": "quiet harbour", "n": 6, "sampling": {"max_tokens": 20, "seed": 5}, "return_token_ids": True}
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as client:
        drawn = (await client.post("/rerank", json=ask)).json()["results"]
        items = [{"prompt": ask["prompt"], "response_ids": one["token_ids"]} for one in drawn]
        scores = (await client.post("/score", json={"items": items})).json()
        unknown = await client.post("/score", json={"items": [{"prompt": "a", "response_ids": [5, 10**6]}]})
        both = await client.post("/score", json={"items": [{"prompt": "a", "response": "b", "response_ids": [5]}]})
    assert [one["score"] for one in scores["scores"]] == pytest.approx(
        [one["score"] for one in drawn], rel=1e-4, abs=1e-4
    )
    assert scores["usage"]["completion_tokens"] == sum(one["completion_tokens"] for one in drawn)
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (422, "items.0.response_ids")
    assert (both.status_code, both.json()["error"]["param"]) == (422, "items.0.response_ids")


async def test_a_text_scores_the_same_in_score_and_in_margin(server):
    [pair] = pairs(1, seed=77)
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as client:
        margin = (await client.post("/margin", json={"pairs": [pair]})).json()["margins"][0]
        items = [{"prompt": pair["prompt"], "response": pair[side]} for side in ("chosen", "rejected")]
        scores = [s["score"] for s in (await client.post("/score", json={"items": items})).json()["scores"]]
    assert [margin["chosen_score"], margin["rejected_score"]] == pytest.approx(scores, rel=1e-4)


async def test_the_metrics_show_what_was_served(server):
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as client:
        await client.post("/margin", json={"pairs": pairs(3)})
        metrics = (await client.get("/metrics")).text
    for series in (
        'inward_requests_total{code="200",route="/margin"}',
        "inward_prefix_tokens_saved_total",
        "inward_engine_up 1.0",
    ):
        assert series in metrics


async def test_overload_is_a_503_and_who_comes_back_when_it_says_is_answered(folder):
    with serve(folder, "--token-budget", "64", "--queue-tokens", "1000") as served:
        async with httpx.AsyncClient(base_url=served.url, timeout=PATIENCE) as client:
            refused = []

            async def ask(body):
                while (answer := await client.post("/margin", json=body)).status_code == 503:
                    refused.append(answer)
                    await asyncio.sleep(int(answer.headers["retry-after"]))
                return answer

            while not refused:
                answers = await asyncio.gather(*(ask({"pairs": pairs(100, seed)}) for seed in range(3)))
                assert [answer.status_code for answer in answers] == [200] * 3
            assert all(
                a.json()["error"]["code"] == "overloaded" and int(a.headers["retry-after"]) >= 1 for a in refused
            )


async def test_a_caller_that_hangs_up_is_not_computed(tiny_batches):
    async with httpx.AsyncClient(base_url=tiny_batches.url, timeout=PATIENCE) as client:
        for _ in range(10):  # this process may be too slow to hang up in time
            before = await value(client, "inward_batch_size_sum")
            await hang_up_behind(client, {"pairs": pairs(300, 1)}, {"pairs": pairs(300, 2)})
            computed = await value(client, "inward_batch_size_sum") - before
            if computed < 600:
                break
        assert 300 <= computed < 600


async def hang_up_behind(client, body, other):
    """Has ``body`` scored, and hangs up on ``other`` once it waits behind it; returns when the queue is empty."""
    busy = asyncio.create_task(client.post("/margin", json=body))
    held = await until(lambda: value(client, "inward_queue_tokens"))
    content = json.dumps(other).encode()
    head = (
        f"POST /margin HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    with socket.create_connection((client.base_url.host, client.base_url.port)) as caller:
        caller.sendall(head.encode() + content)
        while (now := await value(client, "inward_queue_tokens")) <= held and not busy.done():
            held = now
            await asyncio.sleep(0.01)
    assert (await busy).status_code == 200
    while await value(client, "inward_queue_tokens"):
        await asyncio.sleep(0.01)


def test_a_port_that_is_taken_and_an_address_open_to_all_are_refused_in_one_line(folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for options, said in (
            (["--port", str(taken.getsockname()[1])], "--port"),
            (["--host", "0.0.0.0"], "INWARD_API_KEYS"),
        ):
            done = subprocess.run(
                [sys.executable, "-m", "inward", "serve", "--model", str(folder / "model"), *options],
                capture_output=True, text=True, timeout=PATIENCE,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            )  # fmt: skip
            assert done.returncode == 2
            assert said in done.stderr
            assert "Traceback" not in done.stderr


def test_no_text_of_a_user_reaches_the_log(tiny_batches):
    marker, last = "zebracrossing-7731", "the-last-of-these"
    with httpx.Client(base_url=tiny_batches.url, timeout=PATIENCE) as client:
        pair = {"prompt": marker, "chosen": marker, "rejected": marker}
        bodies = [
            {"pairs": [pair]},
            {"pairs": [pair], marker: 1},
            {"pairs": [{"prompt": marker}]},
            {"pairs": [pair], "head": marker},
        ]
        for route in ("/margin", "/score", "/reward", "/rerank"):
            for body in [
                *bodies,
                {"items": [{"prompt": marker, "response": marker}]},
                {"prompt": marker, "candidates": [marker]},
            ]:
                client.post(route, json=body)
        client.post("/margin", content=marker)
        client.get(f"/heads/{marker}")
        metrics = client.get("/metrics").text
        client.get("/info", headers={"x-request-id": last})
    wait_until(lambda: any(last in line for line in tiny_batches.log))
    assert marker not in "".join(tiny_batches.log)
    assert marker not in metrics


async def test_sigterm_under_load_answers_what_was_accepted_and_exits_with_0(tiny_batches):
    """The last test of this server, which it ends."""
    limits = httpx.Limits(max_connections=40)
    async with httpx.AsyncClient(base_url=tiny_batches.url, timeout=PATIENCE, limits=limits) as client:
        before = await value(client, ANSWERED)
        callers = [asyncio.create_task(client.post("/margin", json={"pairs": pairs(20, s)})) for s in range(32)]
        await until(lambda: accepted(client, before + 32))
        exiting = asyncio.create_task(asyncio.to_thread(tiny_batches.stop))
        answers = await asyncio.gather(*callers)
    assert [a.status_code for a in answers] == [200] * 32
    assert all(len(a.json()["margins"]) == 20 for a in answers)
    assert await exiting == 0
    assert any('"clean": true' in line for line in tiny_batches.log)


async def accepted(client, n):
    """Whether ``n`` requests to /margin are answered or being answered; the one that asks is in flight as well."""
    return await value(client, ANSWERED) + await value(client, "inward_requests_in_flight") > n


async def test_real_pairs_are_all_answered_finite_and_in_order(server):
    real = rows("hh_harmless_pairs.jsonl", 96)
    sent = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in real]
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as client:

        async def post(part):
            answer = await client.post("/margin", json={"pairs": part, "truncate": True})
            return [m["margin"] for m in answer.json()["margins"]]

        parts = await asyncio.gather(*(post(sent[i : i + 3]) for i in range(0, len(sent), 3)))
        together = [margin for part in parts for margin in part]
        alone = [(await post([row]))[0] for row in sent[::8]]
    assert np.isfinite(together).all()
    assert together[::8] == pytest.approx(alone, rel=1e-4, abs=1e-4)
