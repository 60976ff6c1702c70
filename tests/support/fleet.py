"""Real processes around a real Redis: API replicas and workers, to be killed, frozen and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from support.serving import FRESH, PATIENT
from support.waiting import PATIENCE, wait_until

BARE = Path(__file__).with_name("bare_inward.py")
CHAOS_WORKER = Path(__file__).parents[1] / "chaos/worker.py"


@dataclass
class Process:
    """One of the fleet; ``log`` holds the events that it wrote, ``ready`` the one with which it began."""

    popen: subprocess.Popen[str]
    log: list[str] = field(default_factory=list)
    ready: dict[str, object] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return str(self.ready["url"])

    def signal(self, sig: signal.Signals) -> None:
        self.popen.send_signal(sig)

    def kill(self) -> None:
        """As a power cut would."""
        self.popen.kill()
        self.popen.wait()

    def stop(self, timeout: float = 2 * PATIENCE) -> int:
        """SIGTERM; gives the exit status."""
        self.popen.terminate()
        return self.popen.wait(timeout)

    def events(self, name: str) -> list[dict[str, object]]:
        return [
            event for line in list(self.log) if f'"{name}"' in line and (event := json.loads(line))["event"] == name
        ]


class Fleet:
    """Starts processes with the same model, heads and Redis; kills what is left in the end.

    The model is the one in ``folder``, or, with ``demo``, the toy; the ``backbone`` is a fake one if nothing else is
    said.
    """

    def __init__(
        self, folder: Path, redis_url: str | None, *, demo: bool = False, backbone: str = "fake", **settings: object
    ) -> None:
        model = "toy" if demo else str(folder / "model")
        self._options = ["--backbone", backbone, "--model", model, "--port", "0"]
        self._options += ["--redis-url", redis_url] if redis_url else []
        self._heads = [] if demo else ["--heads", str(folder / "heads")]
        self._settings = FRESH | PATIENT | {f"INWARD_{name.upper()}": str(value) for name, value in settings.items()}
        self._stack = ExitStack()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def serve(self, *options: str) -> Process:
        """``inward serve``: API and worker in one process."""
        return self._start([sys.executable, "-m", "inward", "serve", *self._options, *self._heads, *options])

    def api(self, *options: str) -> Process:
        """``inward api``, where nothing is installed for models."""
        return self._start([sys.executable, str(BARE), "api", *self._options, *options])

    def worker(self, *options: str, seconds_per_token: float = 0.0, poison: str = "", hangs: bool = False) -> Process:
        """Poison ends it; with ``hangs`` its device never comes back."""
        chaos = {"CHAOS_SECONDS_PER_TOKEN": str(seconds_per_token), "CHAOS_POISON": poison}
        chaos["CHAOS_HANGS"] = "1" if hangs else ""
        return self._start([sys.executable, str(CHAOS_WORKER), *self._options, *self._heads, *options], chaos)

    def _start(self, command: list[str], more: dict[str, str] | None = None) -> Process:
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join(sys.path),
            "TOKENIZERS_PARALLELISM": "false",
            **self._settings,
            **(more or {}),
        }
        popen = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
        process = Process(popen)
        reader = threading.Thread(target=lambda: process.log.extend(popen.stderr or ()), daemon=True)
        self._stack.callback(self._end, process, reader)
        reader.start()
        return process

    def _end(self, process: Process, reader: threading.Thread) -> None:
        if process.popen.poll() is None:
            process.popen.send_signal(signal.SIGCONT)
            process.popen.kill()
        process.popen.wait()
        reader.join()
        assert process.popen.stderr is not None
        process.popen.stderr.close()

    def wait_until_serving(self, *processes: Process) -> None:
        """Until all have said where they are to be found."""
        for process in processes:
            process.ready = wait_until(lambda process=process: self._living(process).events("ready"))[0]

    def wait_until_ready(self, *processes: Process) -> None:
        """Until all are serving and their /readyz is green."""
        self.wait_until_serving(*processes)
        with httpx.Client(timeout=PATIENCE) as client:
            for process in processes:
                wait_until(lambda process=process: client.get(self._living(process).url + "/readyz").status_code == 200)

    def _living(self, process: Process) -> Process:
        if process.popen.poll() is not None:
            raise AssertionError(f"a process ended with {process.popen.returncode}: {''.join(process.log)[-3000:]}")
        return process
