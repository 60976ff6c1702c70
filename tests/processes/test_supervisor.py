"""Long-lived tasks: one that fails is logged with its frames, begun again, and shown until it has proved itself."""

import asyncio
import io
import json
import logging

import pytest

from inward import logs, metrics
from inward.processes.supervisor import Supervisor
from support.waiting import until

QUICK = (0.001, 0.004)


@pytest.fixture
def logged():
    root = logging.getLogger()
    before = root.handlers[:], root.level
    stream = io.StringIO()
    logs.configure(stream=stream)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    root.handlers[:], root.level = before


class Failing:
    """Fails so often, and then runs until it is stopped."""

    def __init__(self, times, error=KeyError):
        self.times, self.error, self.begun, self.running = times, error, 0, asyncio.Event()

    async def run(self):
        self.begun += 1
        if self.begun <= self.times:
            raise self.error("what somebody wrote")
        self.running.set()
        await asyncio.Event().wait()


async def test_a_task_that_fails_is_begun_again_and_logged_with_its_frames_and_without_its_message(logged):
    tasks, task = Supervisor(pauses=QUICK), Failing(3)
    tasks.watch("bulk", task.run)
    await task.running.wait()
    await tasks.stop()
    events = [event for event in logged() if event["event"] == "task_failed"]
    assert [event["again_in_s"] for event in events] == [0.001, 0.002, 0.004]
    assert (events[0]["level"], events[0]["task"], events[0]["exception"]) == ("error", "bulk", "KeyError")
    assert any(frame.startswith("test_supervisor.run:") for frame in events[0]["trace"])
    assert "somebody wrote" not in str(events)


async def test_what_failed_is_shown_until_it_has_run_for_a_while():
    tasks, task = Supervisor(pauses=QUICK, proven=0.05), Failing(2)
    assert tasks.problem is None
    tasks.watch("bulk", task.run)
    await task.running.wait()
    assert "'bulk' failed (KeyError)" in tasks.problem
    await until(lambda: tasks.problem is None)
    await tasks.stop()


async def test_others_go_on_and_failures_are_counted():
    tasks, bad, good = Supervisor(pauses=QUICK), Failing(10**9), Failing(0)
    tasks.watch("good", good.run)
    tasks.watch("bad of this test", bad.run)
    await until(lambda: bad.begun > 5)
    await tasks.stop()
    assert good.begun == 1
    assert metrics.REGISTRY.get_sample_value("inward_task_failures_total", {"task": "bad of this test"}) >= 5


async def test_a_task_that_returns_is_done_and_one_that_is_stopped_ends_without_a_failure(logged):
    tasks = Supervisor(pauses=QUICK)
    done = tasks.watch("done", Failing(0, None).running.wait)
    other = Failing(0)
    tasks.watch("other", other.run)
    await other.running.wait()
    await tasks.stop("other")
    assert not done.done()
    await tasks.stop()
    assert (tasks.problem, [event for event in logged() if event["event"] == "task_failed"]) == (None, [])


async def test_of_a_group_the_error_inside_is_told_and_a_cancellation_from_within_is_a_failure(logged):
    tasks = Supervisor(pauses=QUICK)

    async def grouped():
        async with asyncio.TaskGroup() as group:
            group.create_task(Failing(1, ZeroDivisionError).run())

    async def cancelled():
        raise asyncio.CancelledError

    tasks.watch("grouped", grouped)
    tasks.watch("cancelled", cancelled)
    await until(lambda: len([e for e in logged() if e["event"] == "task_failed"]) >= 4)
    await tasks.stop()
    assert {e["exception"] for e in logged()} == {"ZeroDivisionError", "CancelledError"}
