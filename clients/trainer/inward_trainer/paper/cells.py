"""Results that are written down when they are there, and made by whichever process comes first.

A cell is a JSON file ``OUT/cells/NAME.json``. Whoever makes it holds a lock, which ends with the process; others do
something else meanwhile, or wait. So the same command, started several times, shares the work, and started again it
goes on.
"""

from __future__ import annotations

import fcntl
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from inward_trainer.durable import write_text
from inward_trainer.errors import TrainerError
from inward_trainer.models import first_line

LOG = logging.getLogger(__name__)
Json = dict[str, Any]
Make = Callable[[], Json]


class OutOfTime(TrainerError):
    """There was no time left to begin it."""


@dataclass(frozen=True, slots=True)
class Missing:
    """A cell that is not there, and why."""

    reason: str


def why_missing(cells: Sequence[Json | Missing]) -> str:
    """Of the cells of a row's seeds; nothing where all are there."""
    missing = [cell for cell in cells if isinstance(cell, Missing)]
    if not missing:
        return ""
    return (
        missing[0].reason
        if len(missing) == len(cells)
        else f"{len(missing)} of {len(cells)} seeds: {missing[0].reason}"
    )


class Cells:
    """The cells of one run.

    Args:
        folder: ``OUT``.
        minutes: from now; later no cell is begun. None: however long it takes.
        release: called after each cell: gives back what it leaves in memory.
    """

    def __init__(self, folder: Path, minutes: float | None = None, release: Callable[[], None] | None = None) -> None:
        self.folder, self._release = folder, release
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes

    def need(self, name: str, make: Make) -> Json:
        """The cell, made now unless it is there; where another process makes it, that is waited for.

        Raises:
            OutOfTime: it is not there, and it is too late to begin it.
        """
        if (found := self.find(name)) is not None:
            return found
        with self._locked(name, wait=True):
            return self._make(name, make)

    def every(self, makers: Mapping[str, Make], what: str) -> dict[str, Json | Missing]:
        """All of these cells: first those that nobody else makes. One that fails doesn't keep the others from being
        made.
        """
        found: dict[str, Json | Missing] = {}

        def attempt(name: str) -> None:
            found[name] = self._attempt(name, makers[name])

        self._each({name: partial(attempt, name) for name in makers}, what, "cell")
        return {name: found[name] for name in makers}

    def share(self, tasks: Mapping[str, Callable[[], object]], what: str) -> None:
        """Does these tasks, which keep what they make themselves; those that other processes are at come last."""
        self._each({f"task-{name}": task for name, task in tasks.items()}, what, "part")

    def find(self, name: str) -> Json | None:
        """The cell, if it is there."""
        path = self._path(name)
        return dict(json.loads(path.read_text("utf-8"))) if path.is_file() else None

    def _each(self, tasks: Mapping[str, Callable[[], object]], what: str, unit: str) -> None:
        """Each under the lock of its name; those whose lock another process has come last."""
        left = dict(tasks)
        with tqdm(total=len(tasks), desc=what, unit=unit) as bar:
            for wait in (False, True):
                for name, task in list(left.items()):
                    with self._locked(name, wait=wait) as ours:
                        if not ours:
                            continue
                        task()
                    del left[name]
                    bar.update()

    def _attempt(self, name: str, make: Make) -> Json | Missing:
        try:
            return self._make(name, make)
        except OutOfTime as error:
            return Missing(str(error))
        except Exception as error:
            LOG.exception("cell %s failed", name)
            return Missing(f"{type(error).__name__}: {first_line(error)}")

    def _make(self, name: str, make: Make) -> Json:
        """Under the lock."""
        if (found := self.find(name)) is not None:
            return found
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise OutOfTime("not reached in the time that was given: the same command goes on with it")
        began = time.monotonic()
        try:
            made = make()
        finally:
            if self._release is not None:
                self._release()
        made["seconds"] = round(time.monotonic() - began, 2)
        write_text(self._path(name), json.dumps(made, allow_nan=False))
        LOG.info("%s: %.1f s", name, made["seconds"])
        return made

    def _path(self, name: str) -> Path:
        return self.folder / "cells" / f"{name}.json"

    @contextmanager
    def _locked(self, name: str, *, wait: bool) -> Iterator[bool]:
        """Whether the lock is ours."""
        path = self.folder / "locks" / f"{name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
            else:
                yield True
