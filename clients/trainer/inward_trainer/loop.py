"""The online loop: pairs → optimiser steps → checkpoint → a new version of the policy in the service → pairs of that
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
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from inward_trainer.annotate import Judges
from inward_trainer.checkpoints import mark_complete
from inward_trainer.errors import DivergedError
from inward_trainer.evaluation import judged
from inward_trainer.feed import Feed, Gatherer
from inward_trainer.held_out import HeldOut
from inward_trainer.journal import Step
from inward_trainer.logs import Log
from inward_trainer.pairs import ScoredPair
from inward_trainer.policy import Publisher
from inward_trainer.service import Service
from inward_trainer.stopping import Stopping
from inward_trainer.trainer import CdpoTrainer

LOG = logging.getLogger(__name__)
Measure = Callable[[Sequence[ScoredPair]], Sequence[float]]


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
class MainProcess:
    """What only the main process has."""

    gatherer: Gatherer
    log: Log
    publisher: Publisher | None = None
    update_head: HeadUpdates | None = None
    judges: Judges | None = None
    held_out: HeldOut | None = None
    eval_pairs: Sequence[ScoredPair] = ()
    lender: Service | None = None
    """The service, if it sleeps while a step is computed."""


class OnlineLoop(TrainerCallback):  # type: ignore[misc]
    """What happens between the steps.

    Args:
        main: None in all processes but the main one.
        wait: lets all processes come to the same point; called by each of them.
        every: steps between two checkpoints.
        evaluate: judges every checkpoint, in all processes; says whether the run should end.
        measure: estimates the policy's KL to its reference from answers that it drew; None where one process alone
            can't compute.
    """

    def __init__(
        self,
        feed: Feed,
        main: MainProcess | None,
        stopping: Stopping,
        *,
        wait: Callable[[], None],
        every: int,
        evaluate: Callable[[int], bool] | None = None,
        measure: Measure | None = None,
    ) -> None:
        self._feed, self._main, self._stopping, self._wait, self._every = feed, main, stopping, wait, every
        self._evaluate, self._measure = evaluate or (lambda step: False), measure
        self._saved = 0
        self._began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._feed.done = self._saved = state.global_step
        if self._evaluate(state.global_step) or state.global_step >= state.max_steps:
            self._feed.end()
        if self._main is not None:
            self._settle(args, state)
            self._main.log.series.begins(state.global_step, state.max_steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = time.monotonic()
        if self._main is not None and self._main.lender is not None:
            self._main.lender.sleep()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        refuse_divergence(model, state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._feed.done = state.global_step
        step, main = self._feed.current, self._main
        if main is not None and main.lender is not None:
            torch.cuda.empty_cache()  # what the step held; nothing happens without a GPU
            main.lender.wake()
        if main is not None and step is not None:
            main.log.series.step(state.global_step, len(step.pairs), time.monotonic() - self._began)
            if main.update_head is not None:
                main.update_head(step)
            rewards = [
                score for pair in step.pairs for score in (pair.chosen_score, pair.rejected_score) if score is not None
            ]
            main.log.histogram(state.global_step, "hybrid/rewards", rewards)
        control.should_save = state.global_step % self._every == 0 or state.global_step >= state.max_steps

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # the source ended, or somebody asked for the end: what was learnt since is worth a checkpoint
        control.should_save = state.global_step != self._saved

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if self._main is not None and logs and "loss" in logs:  # the trainer's last line, without, sums up the run
            self._main.log.write(state.global_step, logs | self._about_pairs(state.global_step - 1))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._saved = state.global_step
        self._wait()
        if self._main is not None:
            mark_complete(_checkpoint(args, state))
        if self._evaluate(state.global_step):
            self._feed.end()
        if self._main is not None and self._stopping.signal is None:  # else it is done when the run goes on
            self._settle(args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._main is not None and self._stopping.signal is None:
            self._settle(args, state)  # what a kill left undone, if the source had nothing since
            self._main.log.series.begins(state.global_step, state.global_step)

    def _about_pairs(self, done: int) -> dict[str, Any]:
        """Which pairs the step had, and by how many versions their policy was behind, at most."""
        step = self._feed.current
        if self._main is None or step is None:
            return {}
        told: dict[str, Any] = {"pairs": [pair.id for pair in step.pairs]}
        if self._main.publisher is not None:
            ages = [self._main.publisher.age(pair.policy_version, done) for pair in step.pairs]
            told["policy_lag"] = max((age for age in ages if age is not None), default=None)
        return told

    def _settle(self, args: Any, state: Any) -> None:
        """See the module, 4."""
        assert self._main is not None
        done, journal, publisher = state.global_step, self._main.gatherer.journal, self._main.publisher
        steps = list(journal.up_to(done))
        self._main.gatherer.source.settle([receipt for step in steps for receipt in step.receipts])
        if publisher is not None:
            over = done >= state.max_steps or self._feed.ended
            if done and (done % self._every == 0 or over):
                publisher.publish(done, _checkpoint(args, state))
                before = publisher.last_before(done)
                recent = [pair for step in steps if step.number > before for pair in step.pairs]
                look(self._main, done, recent, self._measure)
            else:
                publisher.enforce(done)
                if not done:
                    look(self._main, done, [], self._measure)
        journal.forget_before(done)


def look(main: MainProcess, done: int, recent: Sequence[ScoredPair], measure: Measure | None) -> None:
    """What heads say of a new version, once: of the pairs that made it, and of fresh samples of held-out prompts; and
    how far it is from its reference.
    """
    if any(line["step"] == done and "policy_version" in line for line in main.log.lines):
        return
    assert main.publisher is not None
    values: dict[str, Any] = {"policy_version": main.publisher.version(done)}
    if main.judges is not None and recent:
        values |= main.judges.agreement(recent)
    if main.judges is not None and main.eval_pairs:
        values |= judged(main.judges, main.eval_pairs)
    if main.held_out is not None:
        values |= main.held_out()
        values |= main.held_out.divergence(measure) if measure is not None else {}
    main.log.measured(done, values)


def refuse_divergence(model: Any, step: int) -> None:
    """Raises ``DivergedError`` if a gradient is not finite: one more step, and no weight is a number."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if gradients and not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
        raise DivergedError(
            f"the gradient of step {step} is not finite: training has diverged. The last checkpoint is sound: run "
            "again with a lower --learning-rate, and it goes on from there"
        )


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
