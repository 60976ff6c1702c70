"""The policy's versions: named after the run and the step, copied from checkpoints to the folder from which the
service loads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from inward_trainer.durable import copy_folder
from inward_trainer.service import BASE, Service

FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True, slots=True)
class Versions:
    """What the versions of one run are called. The first is the service's base model."""

    run: str
    every: int
    """Steps between two versions."""

    def name(self, step: int) -> str:
        """The version that is served after ``step`` steps."""
        published = step - step % self.every
        return f"{self.run}-{published:06d}" if published else BASE

    def age(self, version: str | None, step: int) -> int | None:
        """How many publications ``version`` is behind the one of ``step``; None if it is none of this run's."""
        if version == BASE:
            made = 0
        else:
            run, _, number = (version or "").rpartition("-")
            if run != self.run or not number.isdigit():
                return None
            made = int(number)
        return (step - step % self.every - made) // self.every


class Publisher:
    """Puts adapters where the service finds them, and makes it use them.

    Args:
        folder: the service's ``--adapters``.
    """

    def __init__(self, folder: Path, versions: Versions, service: Service) -> None:
        self.versions = versions
        self._folder, self._service = folder, service

    def publish(self, step: int, checkpoint: Path) -> str:
        """The adapter of a checkpoint becomes a version. What has a name once never changes. Safe to do again."""
        name = self.versions.name(step)
        if name != BASE and step % self.versions.every == 0:
            copy_folder([checkpoint / file for file in FILES], self._folder / name)
        self.enforce(step)
        return name

    def enforce(self, step: int) -> None:
        """Loads the version of ``step`` if the service has another one now, for instance after a restart."""
        self._service.load_policy(self.versions.name(step))
