"""What a run took from its source and did not yet learn for good: one file a step, written before the step uses it.

A trainer that is killed goes back to its last checkpoint and does the steps after it again, with exactly the pairs of
before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from inward_trainer.durable import write_text
from inward_trainer.pairs import ScoredPair
from inward_trainer.sources.base import Cursor


@dataclass(frozen=True, slots=True)
class Step:
    """The pairs of one optimiser step, the receipts of all that was taken for it, and how far its source was read
    then.
    """

    number: int
    pairs: tuple[ScoredPair, ...]
    receipts: tuple[str, ...]
    cursor: Cursor


class Journal:
    """Steps by number, from 1, as JSON files of one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, number: int) -> Step | None:
        """The step, if it is there."""
        path = self._path(number)
        if not path.is_file():
            return None
        values = json.loads(path.read_text("utf-8"))
        pairs = tuple(ScoredPair.from_json(pair) for pair in values["pairs"])
        return Step(number, pairs, tuple(values["receipts"]), values["cursor"])

    def write(self, step: Step) -> None:
        """Keeps it, also through a power cut."""
        values = {"pairs": [pair.to_json() for pair in step.pairs], "receipts": step.receipts, "cursor": step.cursor}
        write_text(self._path(step.number), json.dumps(values))

    def up_to(self, number: int) -> Iterator[Step]:
        """All steps that are kept, up to this one."""
        for path in sorted(self._folder.glob("*.json")):
            if int(path.stem) <= number and (step := self.read(int(path.stem))) is not None:
                yield step

    def forget_before(self, number: int) -> None:
        """Drops earlier steps; ``number`` itself says where the source goes on."""
        for path in self._folder.glob("*.json"):
            if int(path.stem) < number:
                path.unlink()

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:08d}.json"
