"""On a real server and real sockets: what only they show."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import httpx
import pytest
import uvicorn

from inward import metrics
from inward.api.services import Limits
from support.fake_services import FakeServices, error
from support.waiting import PATIENCE, until

PAIR = {"prompt": "p", "chosen": "aa", "rejected": "b"}
JSON = {"content-type": "application/json"}


@contextlib.asynccontextmanager
async def serving(api: FakeServices) -> AsyncIterator[int]:
    """Serves on a free port of the loopback address, which is given."""
    config = uvicorn.Config(
        api.app, host="127.0.0.1", port=0, log_config=None, lifespan="off",
        timeout_graceful_shutdown=round(PATIENCE), timeout_keep_alive=round(PATIENCE),
    )  # fmt: skip
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # they are pytest's
    task = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await task


async def test_a_body_that_does_not_come_in_time_is_refused():
    async with serving(FakeServices(limits=Limits(body_s=0.2))) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(raw_request(b'{"pairs": []}')[:-1])
        answer = await asyncio.wait_for(reader.read(), PATIENCE)
        writer.close()
    assert answer.startswith(b"HTTP/1.1 408") and b'"code": "too_slow"' in answer


@pytest.fixture
async def port(api):
    async with serving(api) as port:
        yield port


def raw_request(body: bytes) -> bytes:
    head = f"POST /margin HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def test_a_caller_that_hangs_up_cancels_its_work(api, port):
    api.intake.hold = asyncio.Event()
    before = metrics.REGISTRY.get_sample_value("inward_requests_total", {"route": "/margin", "code": "499"}) or 0
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(raw_request(json.dumps({"pairs": [PAIR]}).encode()))
    await asyncio.wait_for(api.intake.started.wait(), PATIENCE)
    writer.close()
    await asyncio.wait_for(api.intake.cancelled.wait(), PATIENCE)
    await until(lambda: metrics.REGISTRY.get_sample_value("inward_requests_in_flight") == 0)
    assert metrics.REGISTRY.get_sample_value("inward_requests_total", {"route": "/margin", "code": "499"}) == before + 1


async def test_a_caller_that_hangs_up_in_the_middle_of_its_body_leaves_nothing_behind(api, port):
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(raw_request(b" " * 1000)[:-500])
    await writer.drain()
    await until(lambda: metrics.REGISTRY.get_sample_value("inward_requests_in_flight") == 1)
    writer.close()
    await until(lambda: metrics.REGISTRY.get_sample_value("inward_requests_in_flight") == 0)
    assert api.intake.calls == []


async def test_a_10_mb_body_is_answered_413_and_the_connection_goes_on(api, port):
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE) as client:
        large = await client.post("/margin", content=b" " * 10_000_000, headers=JSON)
        assert (large.status_code, error(large)["code"]) == (413, "too_large")
        assert (await client.post("/margin", json={"pairs": [PAIR]})).status_code == 200


async def test_a_10_mb_body_in_chunks_is_answered_413(api, port):
    async def chunks():
        for _ in range(1000):
            yield b" " * 10_000

    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE) as client:
        large = await client.post("/margin", content=chunks(), headers=JSON)
        assert (large.status_code, error(large)["code"]) == (413, "too_large")
        assert (await client.post("/margin", json={"pairs": [PAIR]})).status_code == 200


async def test_many_callers_get_their_own_answers(api, port):
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE) as client:
        pairs = [{"prompt": "p", "chosen": "x" * (n + 1), "rejected": "y"} for n in range(64)]
        answers = await asyncio.gather(*(client.post("/margin", json={"pairs": [pair]}) for pair in pairs))
    assert [answer.json()["margins"][0]["margin"] for answer in answers] == [float(n) for n in range(64)]


async def test_two_requests_on_one_connection_without_waiting_are_both_answered(api, port):
    request = raw_request(json.dumps({"pairs": [PAIR]}).encode())
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request + request)
    received = b""
    while received.count(b'"margin":1.0') < 2:
        received += await asyncio.wait_for(reader.read(65536), PATIENCE)
    assert received.count(b"HTTP/1.1 200") == 2
    writer.close()
