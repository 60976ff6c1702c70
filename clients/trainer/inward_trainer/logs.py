"""The run's record: one JSON line a step in ``log.jsonl``, and the same for TensorBoard and Prometheus."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from inward_trainer.durable import write_text
from inward_trainer.metrics import RunSeries


class Log:
    """Holds one trajectory only: lines after the step from which a run goes on are dropped, since those steps are done
    again.

    Args:
        folder: of ``log.jsonl`` and ``tensorboard/``.
        done: steps that are done when it is opened.
        run: the run's name.
    """

    def __init__(self, folder: Path, done: int, *, run: str = "run", tensorboard: bool = True) -> None:
        self._path = folder / "log.jsonl"
        self.lines = [line for line in read_log(self._path) if line["step"] <= done]
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in self.lines))
        self.series = RunSeries(run, self.lines)
        self.report: Callable[[dict[str, float]], Any] | None = None
        """Told what ``measured`` is, where others keep records: the trainer reports its own steps."""
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One line, in which what is not finite is null; numbers go to TensorBoard and Prometheus as well."""
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        self.lines.append({"step": step, **finite})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.lines[-1]) + "\n")
        self.series.logged(finite)
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    self._board.add_scalar(name, value, step)
            self._board.flush()

    def measured(self, step: int, values: Mapping[str, Any]) -> None:
        """A line of what was found out between two steps."""
        self.write(step, values)
        if self.report is not None:
            self.report({name: value for name, value in values.items() if isinstance(value, int | float)})

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        """A distribution, for TensorBoard only."""
        if self._board is not None and values:
            import numpy as np

            self._board.add_histogram(name, np.asarray(values), step)

    def close(self) -> None:
        """Writes down what is still in memory."""
        if self._board is not None:
            self._board.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; a last one that a crash cut short is left out."""
    lines: list[dict[str, Any]] = []
    for line in path.read_text("utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines
