"""Several processes of the same command, which share the cells: one GPU is not busy with one small model."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from tqdm import tqdm

from inward_trainer.options import PaperOptions

STARTS = ("alignment", "judge", "legend", "srr", "alignment", "legend")
"""Which table each worker begins with; afterwards it helps with the others."""
LOOK_S = 0.5
"""Between two looks at what is done."""


def work(options: PaperOptions, tables: Sequence[str]) -> int:
    """Starts the workers and waits for them; how many of them ended with an error. What they say is in ``OUT/logs``."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = {name: str(max(1, cpus // options.workers)) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    logs = options.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        running = []
        for number in range(options.workers):
            log = stack.enter_context((logs / f"worker-{number}.log").open("a"))
            words = [sys.executable, "-m", "inward_trainer", "paper", *arguments(options, _order(tables, number))]
            process = subprocess.Popen(words, env=threads | dict(os.environ), stdout=log, stderr=log)
            stack.callback(process.kill)  # a worker that has ended does not mind
            running.append(process)
        _watch(options, running)
        return sum(process.returncode != 0 for process in running)


def arguments(options: PaperOptions, tables: Sequence[str]) -> list[str]:
    """The command line of one worker."""
    values: dict[str, Any] = {name: value for name, value in options if value is not None}
    sizes = ",".join(f"{name}={count}" for name, count in options.sizes.items())
    values |= {"tables": ",".join(tables), "seeds": ",".join(map(str, options.seeds)), "sizes": sizes, "workers": 1}
    quick = ["--quick"] if values.pop("quick") else []
    return quick + [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def _order(tables: Sequence[str], number: int) -> list[str]:
    first = STARTS[number % len(STARTS)]
    return sorted(tables, key=lambda name: name != first)


def _watch(options: PaperOptions, running: Sequence[subprocess.Popen[bytes]]) -> None:
    """Counts cells until all workers have ended."""
    folder = options.out / "cells"
    with tqdm(desc=f"{len(running)} workers", unit="cell") as bar:
        while any(process.poll() is None for process in running):
            done = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime) if folder.is_dir() else []
            if len(done) > bar.n:
                bar.set_postfix_str(done[-1].stem)
                bar.update(len(done) - bar.n)
            time.sleep(LOOK_S)
