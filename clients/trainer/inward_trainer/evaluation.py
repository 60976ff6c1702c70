"""How good a checkpoint is, by pairs that nobody trains on: the best is kept, and a run that only gets worse ends."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from inward_trainer.annotate import Judges, agrees
from inward_trainer.durable import write_text
from inward_trainer.logs import Log
from inward_trainer.pairs import ScoredPair
from inward_trainer.processes import agreed
from inward_trainer.statistics import estimates

LOG = logging.getLogger(__name__)
PairLosses = Callable[[Sequence[int]], Sequence[tuple[float, float]]]
"""Places of pairs → loss and margin (reward of chosen minus reward of rejected) of each."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What follows from an evaluation."""

    better: bool = False
    """Than any before it."""
    enough: bool = False
    """Too many have not been, one after the other."""


class Evaluation:
    """Every process judges its share of the pairs; the main one writes down what comes of it.

    Args:
        pair_losses: this process's model.
        pairs: how many there are.
        save: writes the model to a folder; called by all processes.
        log: None in all processes but the main one.
        best: folder of the best model.
        stop_after: evaluations without a better loss after which it is enough; None is never.
    """

    def __init__(
        self,
        pair_losses: PairLosses,
        pairs: int,
        save: Callable[[str], Any],
        log: Log | None,
        best: Path,
        *,
        stop_after: int | None,
        rank: int,
        processes: int,
    ) -> None:
        self._pair_losses, self._pairs, self._save, self._log, self._best = pair_losses, pairs, save, log, best
        self._stop_after, self._rank, self._processes = stop_after, rank, processes

    def __call__(self, step: int) -> bool:
        """Judges the model after ``step`` steps; whether training should end. Done again, it changes nothing."""
        known = agreed(self._log is not None and self._line(step) is not None, self._processes)
        values = {} if known else self._values()
        if self._log is not None and not known:
            self._log.measured(step, values)
        verdict: Verdict = agreed(self._verdict(step), self._processes)
        if verdict.better:
            self._keep(step)
        return verdict.enough

    def _values(self) -> dict[str, float]:
        """``eval/loss``, ``eval/accuracy`` and ``eval/margin``, each with its standard error."""
        share = -(-self._pairs // self._processes)
        mine = range(self._rank * share, (self._rank + 1) * share)
        # all processes do the same number of passes, as sharded models need; what is past the end is the last pair's
        judged = self._pair_losses([min(place, self._pairs - 1) for place in mine])
        found = list(zip(mine, judged, strict=True))
        everywhere = dict(gather_object(found) if self._processes > 1 else found)
        pairs = [everywhere[place] for place in range(self._pairs)]
        return estimates(
            "eval",
            {
                "loss": [loss for loss, _ in pairs],
                "accuracy": [float(margin > 0) for _, margin in pairs],
                "margin": [margin for _, margin in pairs],
            },
        )

    def _verdict(self, step: int) -> Verdict:
        if self._log is None:
            return Verdict()
        losses = [line["eval/loss"] for line in self._log.lines if "eval/loss" in line and 0 < line["step"] <= step]
        losses = [math.inf if loss is None else loss for loss in losses]
        if not losses:
            return Verdict()
        since = len(losses) - 1 - losses.index(min(losses))
        enough = self._stop_after is not None and since >= self._stop_after
        if enough:
            LOG.info("no better evaluation in %d: the run ends; the best is %s", since, self._best)
        return Verdict(better=since == 0, enough=enough)

    def _keep(self, step: int) -> None:
        """The model as it is becomes the best, wholly or not at all."""
        fresh = self._best.with_name(f".{self._best.name}")
        if self._log is not None:
            shutil.rmtree(fresh, ignore_errors=True)
        agreed(None, self._processes)
        self._save(str(fresh))
        if self._log is not None:
            write_text(fresh / "evaluation.json", json.dumps(self._line(step), indent=2) + "\n")
            shutil.rmtree(self._best, ignore_errors=True)
            fresh.rename(self._best)

    def _line(self, step: int) -> dict[str, Any] | None:
        assert self._log is not None
        return next((line for line in self._log.lines if line["step"] == step and "eval/loss" in line), None)


def judged(judges: Judges, pairs: Sequence[ScoredPair]) -> dict[str, float]:
    """What heads say of evaluation pairs with the policy as it is: of ``hybrid`` and ``monitor`` the mean reward of
    chosen, the mean difference and the share of agreement, each with its standard error.
    """
    values: dict[str, list[float]] = {}
    for name, both in judges.scores(pairs).items():
        known = [(chosen, rejected) for chosen, rejected in both if chosen is not None and rejected is not None]
        values[f"{name}_reward"] = [chosen for chosen, _ in known]
        values[f"{name}_margin"] = [chosen - rejected for chosen, rejected in known]
        values[f"{name}_accuracy"] = [float(agrees(one)) for one in both]
    return estimates("eval", values)
