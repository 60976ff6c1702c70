"""A worker sends its tokenizer to replicas that have none."""

from __future__ import annotations

import asyncio
import zlib

import pytest

from inward import codec
from inward.control import tokenizer_files
from inward.control.channel import ControlChannel
from inward.errors import SetupError
from inward.processes.wiring import TOY
from inward.stores.connection import Connection
from support.queues import KEYS
from support.waiting import PATIENCE


@pytest.fixture
async def channel(redis_server):
    connection = Connection(redis_server.url, timeout=PATIENCE)
    yield ControlChannel(connection, KEYS)
    await connection.close()


async def answering(channel, answer):
    while (asked := await channel.next_request("worker")) is None:
        pass
    assert codec.decode_map(asked[1], tokenizer_files.VERB)
    await channel.answer(asked[0], codec.encode_map("answer", answer))


def test_what_is_packed_is_unpacked_once_and_holds_no_weights(tmp_path):
    files = tokenizer_files.pack(TOY / "backbone")
    assert {"tokenizer.json", "config.json"} <= files.keys() <= set(tokenizer_files.NAMES)
    folder = tokenizer_files.unpack(files, tmp_path)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        name: (TOY / "backbone" / name).read_bytes() for name in files
    }
    assert tokenizer_files.unpack(dict(files), tmp_path) == folder
    assert [one.name for one in tmp_path.iterdir()] == [folder.name]


@pytest.mark.parametrize("data", [b"no zlib", zlib.compress(b"x" * 1000)[:-4]])
def test_damaged_files_are_refused(data, tmp_path):
    with pytest.raises(SetupError, match="damaged"):
        tokenizer_files.unpack({"tokenizer.json": data}, tmp_path)


def test_files_that_grow_without_end_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_files, "LONGEST_BYTES", 999)
    with pytest.raises(SetupError, match="too long"):
        tokenizer_files.unpack({"tokenizer.json": zlib.compress(b"x" * 1000)}, tmp_path)


def test_names_that_nobody_asked_for_are_not_written(tmp_path):
    folder = tokenizer_files.unpack({"config.json": zlib.compress(b"{}"), "../evil": b""}, tmp_path)
    assert [file.name for file in folder.iterdir()] == ["config.json"]


async def test_a_replica_waits_for_a_worker_and_takes_what_it_sends(channel, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_files, "PATIENCE_S", 0.3)
    monkeypatch.setattr(tokenizer_files, "AGAIN_S", 0.0)
    fetching = asyncio.create_task(tokenizer_files.fetch(channel, tmp_path))
    await asyncio.sleep(0.5)  # a first request that nobody answers
    monkeypatch.setattr(tokenizer_files, "PATIENCE_S", PATIENCE)
    while not fetching.done():
        answer = {"files": tokenizer_files.pack(TOY / "backbone")}
        await asyncio.wait([asyncio.create_task(answering(channel, answer)), fetching], return_when="FIRST_COMPLETED")
    assert (await fetching / "tokenizer.json").read_bytes() == (TOY / "backbone/tokenizer.json").read_bytes()


async def test_an_older_worker_is_told_from_none(channel, tmp_path):
    fetching = asyncio.create_task(tokenizer_files.fetch(channel, tmp_path))
    await answering(channel, {"error": {"code": "unavailable", "message": "does not understand", "param": None}})
    with pytest.raises(SetupError, match="upgrade them"):
        await fetching
