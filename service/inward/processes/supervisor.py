"""Every long-lived task of a process under one eye. One that fails is logged with its frames and begun again after a
pause, and meanwhile the process is not ready.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from inward import logs, metrics

LOG = logs.logger("processes")
PAUSES_S = (0.5, 30.0)
"""Before a task is begun again: the first time, and at most; each one in a row is twice as long."""
PROVEN_S = 3.0
"""For which a task has to run until it counts as well again."""


class Supervisor:
    """See the module.

    Args:
        pauses: as ``PAUSES_S``.
        proven: as ``PROVEN_S``.
    """

    def __init__(self, *, pauses: tuple[float, float] = PAUSES_S, proven: float = PROVEN_S) -> None:
        self._pauses, self._proven = pauses, proven
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._failed: dict[str, str] = {}

    @property
    def problem(self) -> str | None:
        """Why the process is not ready: a task that failed and has not proved itself since; None where all are well."""
        return next(iter(self._failed.values()), None)

    def watch(self, name: str, run: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        """Runs ``run`` until it returns or is stopped, again and again where it fails; the task ends when that does."""
        metrics.TASK_FAILURES_TOTAL.labels(task=name).inc(0)
        task = self._tasks[name] = asyncio.create_task(self._keep(name, run), name=name)
        return task

    async def stop(self, *names: str) -> None:
        """Cancels these tasks, all where none is named, and waits for their ends."""
        stopped = [self._tasks.pop(name) for name in names or list(self._tasks)]
        for task in stopped:
            task.cancel()
        await asyncio.gather(*stopped, return_exceptions=True)

    async def _keep(self, name: str, run: Callable[[], Awaitable[None]]) -> None:
        loop = asyncio.get_running_loop()
        first, longest = self._pauses
        pause = first
        while True:
            began, before = loop.time(), _cancellations()
            proof = loop.call_later(self._proven, self._failed.pop, name, None)
            try:
                await run()
            except (Exception, asyncio.CancelledError) as error:
                if self._is_stopped(name, error, before):
                    raise
                pause = first if loop.time() - began > self._proven else pause
                self._report(name, _innermost(error), pause)
            else:
                self._failed.pop(name, None)
                return
            finally:
                proof.cancel()
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)

    def _is_stopped(self, name: str, error: BaseException, before: int) -> bool:
        """Whether it is us who are to end, and not something inside that was cancelled. A group of tasks may raise its
        own errors instead of our cancellation, so it is not only told by the error; and before Python 3.13 it leaves
        its own cancellation behind, so only those since ``before`` count.
        """
        cancelled = isinstance(error, asyncio.CancelledError) and _cancellations() > before
        return cancelled or self._tasks.get(name) is not asyncio.current_task()

    def _report(self, name: str, error: BaseException, pause: float) -> None:
        metrics.TASK_FAILURES_TOTAL.labels(task=name).inc()
        logs.event(LOG, "task_failed", severity=logging.ERROR, error=error, task=name, again_in_s=pause)
        self._failed[name] = f"the task {name!r} failed ({type(error).__name__}) and is begun again"


def _cancellations() -> int:
    task = asyncio.current_task()
    return 0 if task is None else task.cancelling()


def _innermost(error: BaseException) -> BaseException:
    """The first error of a group, which is a mere wrapper."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
