"""Checkpoints that count: those whose every file was on disk when they were marked."""

from __future__ import annotations

import shutil
from pathlib import Path

from inward_trainer.durable import sync, write_text

MARK = "complete"


def step_of(checkpoint: Path) -> int:
    """Steps that were done when it was saved."""
    return int(checkpoint.name.rpartition("-")[2])


def mark_complete(checkpoint: Path) -> None:
    """Every file of a checkpoint is on disk."""
    for file in checkpoint.rglob("*"):
        if file.is_file():
            sync(file)
    write_text(checkpoint / MARK, "")


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; incomplete ones are removed."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=step_of)
    for path in checkpoints:
        if not (path / MARK).is_file():
            shutil.rmtree(path)
    return next((path for path in reversed(checkpoints) if path.exists()), None)
