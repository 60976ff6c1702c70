import asyncio
import contextlib
import json
import logging
import os
import signal
import socket

import pytest
import uvicorn

from inward.errors import SetupError
from inward.processes.server import connection, listen, run, serve
from inward.settings import Settings
from support.waiting import PATIENCE, until


async def test_answers_are_not_held_back_by_nagles_algorithm():
    seen = asyncio.get_running_loop().create_future()

    async def answer(reader, writer):
        seen.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    with listen("127.0.0.1", 0) as bound:
        server = await asyncio.start_server(answer, sock=bound)
        _, writer = await asyncio.open_connection(*bound.getsockname())
        assert await asyncio.wait_for(seen, PATIENCE)
        writer.close()
        await writer.wait_closed()
        server.close()
        await server.wait_closed()


class Standalone:
    app, draining, stuck, ending = None, False, False, None

    def ready_fields(self):
        return {}

    async def close(self, timeout):
        return True


async def open_house(_):
    return Standalone()


class Enough(Exception):
    pass


def test_a_server_logs_variables_that_are_no_settings(monkeypatch, capsys):
    async def opening(_):
        raise Enough

    root = logging.getLogger()
    before = root.handlers[:], root.level
    monkeypatch.setenv("INWARD_MODLE", "toy")
    try:
        with pytest.raises(Enough):
            run("serve", Settings(port=0), opening)
    finally:
        root.handlers[:], root.level = before
    said = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(e["event"], e["level"], e["variable"], e["meant"]) for e in said] == [
        ("unknown_variable", "warning", "INWARD_MODLE", "INWARD_MODEL")
    ]


async def test_who_reads_that_it_is_ready_can_connect(monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *_: None)  # they are pytest's
    with listen("127.0.0.1", 0) as bound:
        monkeypatch.setattr("inward.processes.server.listen", lambda *_, **__: bound)

        def ready(_):
            socket.create_connection(bound.getsockname(), timeout=PATIENCE).close()
            raise Enough

        monkeypatch.setattr(Standalone, "ready_fields", ready)
        with pytest.raises(Enough):
            await serve(Settings(), open_house)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_that_comes_the_moment_it_is_ready_is_heeded(number, monkeypatch):
    process = Standalone()

    async def opening(_):
        return process

    def ready(_):
        os.kill(os.getpid(), number)
        return {}

    monkeypatch.setattr(Standalone, "ready_fields", ready)
    assert await asyncio.wait_for(serve(Settings(port=0), opening), PATIENCE) == 0
    assert process.draining


async def test_a_port_that_another_one_was_quicker_to_take_is_an_error_that_names_it(monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        with listen("127.0.0.1", port) as bound:
            other.listen()
            monkeypatch.setattr("inward.processes.server.listen", lambda *_, **__: bound)
            with pytest.raises(SetupError, match=str(port)):
                await serve(Settings(), open_house)


@pytest.mark.parametrize("taken", ["listened on", "bound a moment ago"])
async def test_a_port_that_nobody_named_gives_way_to_a_free_one(taken, monkeypatch):
    urls = []

    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]

        async def opening(_):
            other.listen()
            process = Standalone()
            process.ending = asyncio.create_task(asyncio.sleep(0))
            return process

        if taken == "listened on":
            other.listen()
        monkeypatch.setattr("inward.processes.server.logs.event", lambda *_, url="", **__: urls.append(url))
        await serve(Settings(), opening, unnamed=port)
        assert urls[0].startswith("http://127.0.0.1:") and not urls[0].endswith(f":{port}")
        with pytest.raises(SetupError, match=str(port)):
            await serve(Settings(port=port), opening, unnamed=port + 1)


async def test_a_process_whose_device_hangs_is_ended_without_waiting_for_it(monkeypatch):
    ended = []
    monkeypatch.setattr("os._exit", ended.append)
    process = Standalone()
    process.stuck, process.ending = True, asyncio.create_task(asyncio.sleep(0))

    async def opening(_):
        return process

    await serve(Settings(port=0), opening)
    assert ended == [1]


def test_a_free_port_is_ours_alone_before_anybody_listens():
    with listen("127.0.0.1", 0) as bound:
        assert not bound.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)


async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


@contextlib.asynccontextmanager
async def serving(seconds):
    """A server whose callers have so long for their headers."""
    server = uvicorn.Server(
        uvicorn.Config(app, port=0, log_config=None, lifespan="off", http=connection(seconds), timeout_keep_alive=600)
    )
    server.capture_signals = contextlib.nullcontext  # they are pytest's
    task = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    try:
        yield server, server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await asyncio.wait_for(task, PATIENCE)


async def test_a_connection_whose_headers_do_not_come_is_closed():
    async with serving(0.2) as (_, port):
        for start in (b"", b"GET / HT", b"GET / HTTP/1.1\r\nhost: x\r\nx-slow: "):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(start)
            assert await asyncio.wait_for(reader.read(), PATIENCE) == b""
            writer.close()


async def test_each_request_of_a_connection_has_its_own_time():
    async with serving(3600) as (server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(2):
            writer.write(b"GET / HT")
            await until(lambda: server.server_state.connections)
            (open_one,) = server.server_state.connections
            await until(lambda one=open_one: one.waiting is not None)
            writer.write(b"TP/1.1\r\nhost: x\r\n\r\n")
            assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE)).startswith(b"HTTP/1.1 204")
            assert open_one.waiting is None
        writer.close()
