"""The circle: pairs → optimiser steps → checkpoint → a new version of the policy in the service → pairs of that
version.

What happens when, and why a kill at any moment loses nothing and does nothing twice:

1. The pairs of a step are written to the journal, then used. After a crash the same step finds the same pairs.
2. The step ends. Its pairs go to the head as the update of this step's number, which the service applies once.
3. Every few steps a checkpoint is saved, and marked as complete when every file of it is on disk; one without the mark
  does not count.
4. Only then are the pairs acknowledged to their source, the checkpoint's adapter is copied under a name of its own, and
   the service told to load it. All of this is done again after a restart, and changes nothing if it was done before.
"""

from __future__ import annotations

import logging
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from inward_trainer.annotate import Recheck
from inward_trainer.durable import sync, write_text
from inward_trainer.errors import DivergedError
from inward_trainer.feed import Feed, Gatherer
from inward_trainer.held_out import HeldOut
from inward_trainer.journal import Step
from inward_trainer.logs import Log
from inward_trainer.pairs import ScoredPair
from inward_trainer.policy import Publisher
from inward_trainer.service import Service
from inward_trainer.trainer import CdpoTrainer

LOG = logging.getLogger(__name__)
MARK = "complete"


class FedTrainer(CdpoTrainer):
    """A CdpoTrainer whose batches come from a ``Feed``."""

    feed: Feed

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def get_train_dataloader(self) -> DataLoader[Any]:
        # not through accelerate, which fetches a batch ahead to know when the data ends: that one would come from the
        # policy before
        return DataLoader(self.feed, batch_size=self.args.per_device_train_batch_size, collate_fn=self.data_collator)


class HeadUpdates:
    """One online step of the head for every optimiser step.

    Args:
        first: sequence number that the head had when the run began.
    """

    def __init__(self, service: Service, head: str, *, lr: float, first: int) -> None:
        self._service, self._head, self._lr, self._first = service, head, lr, first

    def __call__(self, step: Step) -> None:
        """Sends the pairs of a step; a step that is done again after a crash is not applied again."""
        if not self._service.update_head(self._head, self._first + step.number, step.pairs, self._lr):
            LOG.info("the head has the update of step %d already", step.number)


@dataclass(frozen=True, slots=True)
class Centre:
    """What only the main process has."""

    gatherer: Gatherer
    log: Log
    publisher: Publisher | None = None
    update_head: HeadUpdates | None = None
    recheck: Recheck | None = None
    held_out: HeldOut | None = None


class Circle(TrainerCallback):  # type: ignore[misc]
    """What happens between the steps.

    Args:
        centre: None in all processes but the main one.
        wait: lets all processes come to the same point; called by each of them.
        every: steps between two checkpoints.
    """

    def __init__(self, feed: Feed, centre: Centre | None, *, wait: Callable[[], None], every: int) -> None:
        self._feed, self._centre, self._wait, self._every = feed, centre, wait, every
        self._stop = False
        self.ended = False
        """Whether the run is complete, and was not told to stop."""
        self._saved = 0
        self._began = 0.0

    def stop(self) -> None:
        """Ends the run after the current step, with a checkpoint."""
        self._stop = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._feed.done = self._saved = state.global_step
        if self._centre is not None:
            settle(self._centre, state.global_step, _checkpoint(args, state))
            self._centre.log.series.begins(state.global_step, state.max_steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = time.monotonic()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if gradients and not torch.isfinite(
            torch.nn.utils.get_total_norm(gradients)
        ):  # one more step, and no weight is a number
            raise DivergedError(
                f"the gradient of step {state.global_step + 1} is not finite: training has diverged. The last checkpoint is sound: run "
                "again with a lower --learning-rate, and it goes on from there"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._feed.done = state.global_step
        step, centre = self._feed.current, self._centre
        if centre is not None and step is not None:
            centre.log.series.step(state.global_step, len(step.pairs), time.monotonic() - self._began)
            if centre.update_head is not None:
                centre.update_head(step)
            rewards = [
                score for pair in step.pairs for score in (pair.chosen_score, pair.rejected_score) if score is not None
            ]
            centre.log.histogram(state.global_step, "hybrid/rewards", rewards)
        control.should_save = state.global_step % self._every == 0 or state.global_step >= state.max_steps or self._stop
        control.should_training_stop = control.should_training_stop or self._stop

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self._stop:  # also where the source had less than was planned
            self.ended = True
            if self._centre is not None:
                self._centre.log.series.begins(state.global_step, state.global_step)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = (
            state.global_step != self._saved
        )  # the source ended: what was learnt since is worth a checkpoint

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if (
            self._centre is not None and logs and "loss" in logs
        ):  # the trainer's last line, which has none, sums up the run
            step = self._feed.current
            ids = {"pairs": [pair.id for pair in step.pairs]} if step is not None else {}
            self._centre.log.write(state.global_step, logs | ids)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._saved = state.global_step
        self._wait()
        if self._centre is not None:
            mark_complete(_checkpoint(args, state))
            settle(self._centre, state.global_step, _checkpoint(args, state))


def settle(centre: Centre, done: int, checkpoint: Path) -> None:
    """See the module, 4."""
    journal = centre.gatherer.journal
    steps = list(journal.up_to(done))
    centre.gatherer.source.settle([receipt for step in steps for receipt in step.receipts])
    if centre.publisher is not None:
        version = centre.publisher.publish(done, checkpoint)
        every = centre.publisher.versions.every
        if done % every == 0:
            look(centre, done, version, [pair for step in steps if step.number > done - every for pair in step.pairs])
    journal.forget_before(done)


def look(centre: Centre, done: int, version: str, recent: Sequence[ScoredPair]) -> None:
    """What heads say of a new version, once: of the pairs that made it, and of fresh samples of held-out prompts."""
    if any(line["step"] == done and "policy_version" in line for line in centre.log.kept):
        return
    values: dict[str, Any] = {"policy_version": version}
    if centre.recheck is not None and recent:
        values |= centre.recheck(recent)
    if centre.held_out is not None:
        values |= centre.held_out()
    centre.log.write(done, values)


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def mark_complete(checkpoint: Path) -> None:
    """Every file of a checkpoint is on disk."""
    for file in checkpoint.iterdir():
        if file.is_file():
            sync(file)
    write_text(checkpoint / MARK, "")


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; incomplete ones are removed."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in checkpoints:
        if not (path / MARK).is_file():
            shutil.rmtree(path)
    return next((path for path in reversed(checkpoints) if path.exists()), None)


@contextmanager
def stopping_on_signals(circle: Circle) -> Iterator[None]:
    """The first SIGTERM or Ctrl-C ends the run after its step, with a checkpoint; the second one at once."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def stop(number: int, _: Any) -> None:
        circle.stop()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
