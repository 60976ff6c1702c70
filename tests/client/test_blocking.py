"""What the client for ordinary code has of its own: an interrupted call leaves nothing behind, and a fork works."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from inward_client import Inward
from support.fake_transport import Service, in_turn
from support.waiting import PATIENCE, wait_until

READY = httpx.Response(200, json={"status": "ready"})


def test_an_interrupted_call_cancels_its_request():
    """Where a socket is waited for, Ctrl-C is heeded at once, and the request does not go on behind the caller."""
    begun, cancelled = threading.Event(), threading.Event()

    async def never(request):
        begun.set()
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    inward = Inward("http://service", http=httpx.AsyncClient(transport=httpx.MockTransport(never)))
    main = threading.main_thread().ident

    def interrupt():
        assert begun.wait(PATIENCE)
        wait_until(lambda: sys._current_frames()[main].f_code.co_name == "wait")  # and not still about to
        signal.pthread_kill(main, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        inward.info()
    assert cancelled.wait(PATIENCE)


def test_threads_share_a_client():
    inward = Service(in_turn(READY)).client()
    with ThreadPoolExecutor(8) as pool:
        assert all(health.ready for health in pool.map(lambda _: inward.health(), range(32)))


def test_a_client_that_was_used_before_a_fork_is_of_use_in_the_child():
    inward = Service(in_turn(READY)).client()
    assert inward.health().ready
    child = os.fork()
    if not child:
        os._exit(0 if inward.health().ready else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_stream_that_is_left_early_is_closed():
    closed = threading.Event()

    class Body(httpx.AsyncByteStream):
        async def __aiter__(self):
            yield b'event: sample\ndata: {"index": 0, "text": "a"}\n\n'
            await asyncio.sleep(600)

        async def aclose(self):
            closed.set()

    answer = httpx.Response(200, stream=Body(), headers={"content-type": "text/event-stream"})
    events = Service(in_turn(answer)).client().rerank_stream("p", 2)
    assert next(events).text == "a"
    events.close()
    assert closed.wait(PATIENCE)
