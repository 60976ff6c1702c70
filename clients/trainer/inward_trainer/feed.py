"""From a source to batches: the pairs of each optimiser step, gathered once, written down, and shared out among
processes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from torch.utils.data import IterableDataset

from inward_trainer import metrics
from inward_trainer.annotate import Annotator
from inward_trainer.confidence import Confidence
from inward_trainer.errors import DataError, Stopped
from inward_trainer.journal import Journal, Step
from inward_trainer.pairs import ScoredPair
from inward_trainer.processes import agreed
from inward_trainer.sources import Ended, Source
from inward_trainer.stopping import Stopping
from inward_trainer.tokens import Tokeniser

LOG = logging.getLogger(__name__)
MOST_IN_VAIN = 1000
"""Portions of a source without one usable pair, after which something must be wrong."""


class Gatherer:
    """Takes from the source what one step needs. Lives in the main process only.

    Args:
        usable: those of some pairs that fit the model and were not scored by too old a policy, after so many steps.
        before: called before the source is asked, with the number of steps that are done.
    """

    def __init__(
        self,
        source: Source,
        annotate: Annotator,
        journal: Journal,
        *,
        rows: int,
        usable: Callable[[Sequence[ScoredPair], int], list[ScoredPair]],
        before: Callable[[int], None] = lambda done: None,
    ) -> None:
        self.source, self.journal = source, journal
        self._annotate, self._rows, self._usable, self._before = annotate, rows, usable, before

    def step(self, number: int) -> Step:
        """The pairs of a step: those written down, or else new ones, which are written down before they are given.

        Raises:
            Ended: the source has not enough for a whole step; what it gave for it is as if it had not been taken.
            DataError: it gives nothing that can be used.
        """
        if (known := self.journal.read(number)) is not None:
            return known
        with metrics.GATHER_SECONDS.time():
            step = self._gather(number)
        self.journal.write(step)
        return step

    def _gather(self, number: int) -> Step:
        last = self.journal.read(number - 1)
        cursor = last.cursor if last else None
        pairs: list[ScoredPair] = []
        receipts: list[str] = []
        vain = 0
        while len(pairs) < self._rows:
            self._before(number - 1)
            taken = self.source.take(self._rows - len(pairs), cursor)
            usable = self._annotate(self._usable(taken.pairs, number - 1))
            vain = 0 if usable else vain + 1
            if vain > MOST_IN_VAIN:
                raise DataError(f"none of the last {vain} portions had a pair that can be used; the warnings say why")
            pairs += usable
            receipts += taken.receipts
            cursor = taken.cursor
        return Step(number, tuple(pairs), tuple(receipts), cursor)


class Feed(IterableDataset[dict[str, Any]]):
    """This process's rows of every step, tokenised, in the order in which gradients are accumulated.

    Nothing is fetched ahead: the pairs of a step are gathered when the step before it is done, so that they come from
    its policy.

    Args:
        gatherer: None in all processes but the main one.
        rows: of one step, over all processes.
        batch: rows of one forward pass of one process.
        stopping: ends the feed after the current step, in all processes: the main one's word counts.
    """

    def __init__(
        self,
        gatherer: Gatherer | None,
        tokenise: Tokeniser,
        confidence: Confidence,
        *,
        rows: int,
        batch: int,
        stopping: Stopping,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self._gatherer, self._tokenise, self._confidence = gatherer, tokenise, confidence
        self._rows, self._batch, self._rank, self._processes = rows, batch, rank, processes
        self._stopping = stopping
        self._over = False
        self.ended = False
        """Whether the source has no more; the main process knows."""
        self.done = 0
        """How many steps are done."""
        self.current: Step | None = None
        """The step whose rows were given last."""

    def end(self) -> None:
        """Gives no more; told to all processes."""
        self._over = self.ended = True

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while not self._over:
            step = self._shared(self.done + 1)
            if step is None:
                self._over = True
                return
            self.current = step
            rows = rows_of(step.pairs, self._tokenise, self._confidence)
            for start in range(self._rank * self._batch, self._rows, self._processes * self._batch):
                yield from rows[start : start + self._batch]

    def _shared(self, number: int) -> Step | None:
        """The step, gathered by the main process and sent to the others; None where the source has ended, or somebody
        asked for the end.
        """
        found: Step | None = None
        if self._gatherer is not None:
            try:
                self._stopping.check()
                found = self._gatherer.step(number)
            except Ended:
                self.ended = True
                LOG.info("the source has no more pairs for a whole step")
            except Stopped:
                LOG.info("stopping after step %d", number - 1)
        step: Step | None = agreed(found, self._processes)
        return step


def rows_of(pairs: Sequence[ScoredPair], tokenise: Tokeniser, confidence: Confidence) -> list[dict[str, Any]]:
    """Pairs that are learnt together, as the collator takes them."""
    rows = []
    for pair, gamma in zip(pairs, confidence(pairs), strict=True):
        row: dict[str, Any] = asdict(tokenise(pair)) | {"confidence": gamma}
        row |= {"chosen_score": pair.chosen_score, "rejected_score": pair.rejected_score}
        if pair.monitor is not None:
            row["monitor_chosen"], row["monitor_rejected"] = pair.monitor
        rows.append(row)
    return rows


def fitting(pairs: Sequence[ScoredPair], tokenise: Tokeniser, max_length: int) -> list[ScoredPair]:
    """Those of at most ``max_length`` tokens in prompt and answer. The others are left out: a cut answer would be
    another answer. So are conversations that the chat template doesn't take.
    """
    fit: list[ScoredPair] = []
    long: list[ScoredPair] = []
    for pair in pairs:
        try:
            (fit if tokenise(pair).longest <= max_length else long).append(pair)
        except DataError as error:
            metrics.REFUSED_TOTAL.labels(reason="template").inc()
            LOG.warning("pair %s is left out: %s", pair.id, error)
    if long:
        metrics.REFUSED_TOTAL.labels(reason="too_long").inc(len(long))
        lost = ", ".join(pair.id for pair in long)
        LOG.warning("%d pairs are longer than %d tokens and are left out: %s", len(long), max_length, lost)
    return fit
