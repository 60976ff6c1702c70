"""A run's folder: one trainer at a time, one set of options, and what a run says when it ends."""

from __future__ import annotations

import fcntl
import json
import re
import signal
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from inward_trainer.checkpoints import last_checkpoint, step_of
from inward_trainer.durable import write_text
from inward_trainer.errors import OptionsError, Stopped
from inward_trainer.models import checkpoints
from inward_trainer.options import ModelOptions, ServiceOptions
from inward_trainer.service import Service
from inward_trainer.stopping import Stopping

ELSEWHERE = frozenset(
    "out api_key url redis_url patience at_once idle metrics_port metrics_host steps log_every".split()
)
"""Options that say nothing of what is learnt; secrets among them."""
FIXED = frozenset("full lora_rank lora_alpha lora_targets adapter quantize source template".split())
"""Options that a checkpoint, or the place in a source, depends on."""
SAID = ("margins.jsonl", "job", "job-key", "job-rows", "job-given", "job-results.jsonl")
"""Files of what a service that serves the run's model said of its pairs."""


@dataclass(frozen=True, slots=True)
class Run:
    """What a run is called, and what must not change when it goes on; ``run.json``."""

    name: str
    rows: int
    """Pairs of one step."""
    head_sequence: int | None = None
    """Of the head when the run began: the update of step k has this number + k. None: a run that updates no head."""
    fingerprint: str = ""
    """Of the model that it began with."""
    options: Mapping[str, Any] = field(default_factory=dict)


def new_run(options: ModelOptions, rows: int, fingerprint: str, head_sequence: int | None = None) -> Run:
    """A new one, written down."""
    called = re.sub(r"[^A-Za-z0-9._-]+", "-", options.out.resolve().name).lstrip("._-")[:64]  # as a version is called
    name = f"{called or 'run'}-{uuid.uuid4().hex[:8]}"
    run = Run(name, rows, head_sequence, fingerprint, recorded(options))
    write_text(options.out / "run.json", json.dumps(asdict(run), indent=2) + "\n")
    return run


def has_begun(options: ModelOptions) -> bool:
    """Whether there is anything that a run took from its source or learnt."""
    learnt = last_checkpoint(checkpoints(options)) is not None or (options.out / "final").exists()
    return learnt or any((options.out / "journal").glob("*.json"))


def resumed(options: ModelOptions, rows: int, fingerprint: str) -> Run | None:
    """The run of this folder, if there is one, which goes on. Says which options differ from those that it began with.
    None also where some of them can't while it goes on and it has not begun, since they may be what kept it from that.

    Raises:
        OptionsError: some of them can't, and it has begun.
    """
    path = options.out / "run.json"
    if not path.is_file():
        return None
    run = Run(**json.loads(path.read_text("utf-8")))
    now = recorded(options)
    both = {name: (run.options[name], now[name]) for name in now if name in run.options}
    changed = {name: values for name, values in both.items() if values[0] != values[1]}
    told = {name: f"--{name.replace('_', '-')} {_said(old)} → {_said(new)}" for name, (old, new) in changed.items()}
    fixed = [line for name, line in told.items() if name in FIXED]
    other_model = bool(run.fingerprint) and run.fingerprint != fingerprint
    if other_model:
        fixed.append(f"--model: another model ({run.fingerprint} → {fingerprint})")
    if run.rows != rows:
        fixed.append(f"{run.rows} → {rows} pairs a step (--batch-size × --accumulate × processes)")
    if getattr(options, "update_head", False) and run.head_sequence is None:
        fixed.append("without --update-head")
    if fixed and has_begun(options):
        raise OptionsError(
            f"the run in {options.out} began with other options: {'; '.join(fixed)}. Choose another --out"
        )
    if fixed:
        print(f"begins anew, with other options than before: {'; '.join(fixed)}", file=sys.stderr)
        for name in ("log.jsonl", *(SAID if other_model else ())):
            (options.out / name).unlink(missing_ok=True)
        return None
    if told:
        print(f"goes on with other options than it began with: {'; '.join(told.values())}", file=sys.stderr)
    return run


def recorded(options: ModelOptions) -> dict[str, Any]:
    """What is written down of the options: all that shapes what is learnt, and no secret."""
    values = options.model_dump(mode="json", exclude=set(ELSEWHERE))
    values["training"] = {name: v for name, v in options.training.items() if "token" not in name and "key" not in name}
    return values


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Raises ``OptionsError`` if another trainer works in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OptionsError(f"another trainer works in {folder}") from None
        yield


def connected(options: ServiceOptions, stopping: Stopping, stack: ExitStack) -> Service | None:
    """The service, for as long as ``stack`` is open; None where there is no ``--url``."""
    if not options.url:
        return None
    key = options.api_key.get_secret_value() if options.api_key else None
    service = Service(options.url, api_key=key, patience=options.patience, at_once=options.at_once, stopping=stopping)
    return stack.enter_context(service)


def until_stopped(
    command: str, options: ModelOptions, config: TrainingArguments, work: Callable[[Stopping, ExitStack], int]
) -> int:
    """Does the work of a command; the exit status. On a signal, says how far the run came and how it goes on."""
    stopping = Stopping()
    with ExitStack() as stack:
        stack.enter_context(stopping.on_signals())
        try:
            return work(stopping, stack)
        except Stopped as stop:
            return _say_stopped(command, options, stop, config.max_steps if config.max_steps > 0 else options.steps)


def _say_stopped(command: str, options: ModelOptions, stop: Stopped, steps: int | None) -> int:
    checkpoint = last_checkpoint(checkpoints(options))
    planned = f" of {steps}" if steps else ""
    done = f"step {step_of(checkpoint)}{planned} is kept" if checkpoint else "before the first checkpoint"
    print(
        f"inward-train {command}: stopped by {signal.Signals(stop.signal).name}, {done}; the same command goes on from "
        "there",
        file=sys.stderr,
    )
    return 128 + stop.signal


def _said(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
