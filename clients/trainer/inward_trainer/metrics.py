"""Every Prometheus series of the trainer, and where each is observed.

Base units (seconds, nats), prefix ``inward_trainer_``. Only the main process has them. What a run measures carries the
name of the run and is absent until it was measured: a zero that nobody measured would be a lie.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    start_http_server,
)

from inward_trainer.errors import OptionsError

REGISTRY = CollectorRegistry()
"""Our own, so that a library that counts in the default registry doesn't appear in ours."""
ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)
GCCollector(registry=REGISTRY)

LINGER_S = 20.0
"""Seconds for which a complete run still serves its metrics: longer than the usual interval of 15 s between two
scrapes."""
SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)


def _of_run(name: str, about: str, *labels: str) -> Gauge:
    """Carries the name of the run, and these labels after it."""
    return Gauge(name, about, ("run", *labels), registry=REGISTRY)


# feed
GATHER_SECONDS = Histogram(
    "inward_trainer_gather_duration_seconds",
    "Wait for the pairs of a step: sampling, streams, scores.",
    buckets=SECONDS,
    registry=REGISTRY,
)
REFUSED_TOTAL = Counter(
    "inward_trainer_refused_pairs", "Pairs that were left out, by reason.", ("reason",), registry=REGISTRY
)
for _reason in ("template", "too_long", "too_old", "unscored"):
    REFUSED_TOTAL.labels(reason=_reason)

# loop
STEP_SECONDS = Histogram(
    "inward_trainer_step_duration_seconds",
    "Forward, backward and optimiser of a step.",
    buckets=SECONDS,
    registry=REGISTRY,
)
PAIRS_TOTAL = Counter("inward_trainer_pairs", "Pairs that were trained on since this process began.", registry=REGISTRY)
STEP = _of_run("inward_trainer_step", "Optimiser steps that are done.")
STEPS = _of_run("inward_trainer_steps_planned", "Optimiser steps after which the run ends.")
LAST_STEP = _of_run("inward_trainer_last_step_timestamp_seconds", "When a step was done last, or the run began.")

# logs: what log.jsonl has
LOSS = _of_run("inward_trainer_loss", "cDPO loss of the last logged step.")
LEARNING_RATE = _of_run("inward_trainer_learning_rate", "Of the last logged step.")
GRADIENT_NORM = _of_run("inward_trainer_gradient_norm", "Before clipping, of the last logged step.")
ACCURACY = _of_run(
    "inward_trainer_accuracy",
    "Share of pairs in which chosen has the higher reward, by DPO's reward (policy), the head that is trained against "
    "(head), or the one that nobody updates (monitor).",
    "judge",
)
CONFIDENCE = _of_run("inward_trainer_confidence", "Mean gamma of the last logged step.")
LOG_RATIO = _of_run(
    "inward_trainer_log_ratio_nats", "Mean log-ratio of the answers trained on, policy against reference."
)
KL = _of_run(
    "inward_trainer_kl_nats",
    "KL of the policy to its reference in nats an answer, estimated from its own draws for the held-out prompts.",
)
REWARD = _of_run("inward_trainer_reward", "Hybrid reward of the answers trained on: mean, p10, p50, p90.", "statistic")
HELD_OUT = _of_run(
    "inward_trainer_held_out_reward", "Mean reward of fresh samples of the held-out prompts, by judge.", "judge"
)
HELD_OUT_GAIN = _of_run(
    "inward_trainer_held_out_gain", "The same above the first policy of the run, by judge.", "judge"
)
POLICY_INFO = _of_run("inward_trainer_policy_info", "1 for the version that was published last.", "version")

LOGGED: dict[str, tuple[Gauge, tuple[str, ...]]] = {
    "loss": (LOSS, ()),
    "learning_rate": (LEARNING_RATE, ()),
    "grad_norm": (GRADIENT_NORM, ()),
    "rewards/accuracies": (ACCURACY, ("policy",)),
    "hybrid/accuracy": (ACCURACY, ("head",)),
    "monitor/accuracy": (ACCURACY, ("monitor",)),
    "gamma": (CONFIDENCE, ()),
    "log_ratio": (LOG_RATIO, ()),
    "held_out/kl": (KL, ()),
    **{f"hybrid/reward/{name}": (REWARD, (name,)) for name in ("mean", "p10", "p50", "p90")},
    "held_out/reward": (HELD_OUT, ("head",)),
    "held_out/monitor": (HELD_OUT, ("monitor",)),
}
"""Name in the log → series and the labels after the run."""


class RunSeries:
    """The series of one run.

    Args:
        run: its name.
        kept: lines of the log that it goes on from.
    """

    def __init__(self, run: str, kept: Iterable[Mapping[str, Any]] = ()) -> None:
        self._run = run
        self._first: dict[str, float] = {}
        self._version: str | None = None
        for line in kept:
            self.logged(line)

    def begins(self, done: int, planned: int) -> None:
        """Training begins, or goes on after ``done`` steps."""
        STEPS.labels(self._run).set(planned)
        self._at(done)

    def step(self, done: int, pairs: int, seconds: float) -> None:
        """A step of so many pairs has ended."""
        STEP_SECONDS.observe(seconds)
        PAIRS_TOTAL.inc(pairs)
        self._at(done)

    def logged(self, values: Mapping[str, Any]) -> None:
        """A line of the log; a number in it that is null is one that was not finite."""
        for name, value in values.items():
            if name in LOGGED:
                gauge, labels = LOGGED[name]
                gauge.labels(self._run, *labels).set(math.nan if value is None else value)
                if gauge is HELD_OUT and value is not None:
                    HELD_OUT_GAIN.labels(self._run, *labels).set(value - self._first.setdefault(name, value))
        if "policy_version" in values:
            self._published(values["policy_version"])

    def _at(self, done: int) -> None:
        STEP.labels(self._run).set(done)
        LAST_STEP.labels(self._run).set(time.time())

    def _published(self, version: str) -> None:
        if self._version is not None:
            POLICY_INFO.remove(self._run, self._version)
        POLICY_INFO.labels(self._run, version).set(1)
        self._version = version


def serve(host: str, port: int) -> Callable[[], None]:
    """Answers ``/metrics`` from a thread of its own; call what it gives to end that.

    Raises:
        OptionsError: the port is taken, or the address is not this machine's.
    """
    try:
        # newer Pythons' servers would share a port
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            probe.listen()
        server, thread = start_http_server(port, host, REGISTRY)
    except OSError as error:
        raise OptionsError(f"--metrics-port {port} on {host}: {error.strerror or error}") from None

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop


def linger() -> None:
    """Waits until whoever scrapes has seen the end of a run: one that is gone before its last step was seen looks
    like one that failed.
    """
    time.sleep(LINGER_S)
