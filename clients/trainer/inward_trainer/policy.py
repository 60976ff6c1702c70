"""The policy's versions: named after the run and the step, copied from checkpoints to the folder from which the
service loads them.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from inward_trainer.durable import copy_folder
from inward_trainer.errors import OptionsError
from inward_trainer.service import BASE, Service

FILES = ("adapter_config.json", "adapter_model.safetensors")


class Publisher:
    """Puts adapters where the service finds them, and makes it use them. What was published stands in the folder: a
    version is there only if its checkpoint was complete.

    Args:
        folder: the service's ``--adapters``.
        run: its name; the versions of one run are ``<run>-<step>``.
        keep: so many of the newest versions stay; the others are removed.
    """

    def __init__(self, folder: Path, run: str, service: Service, *, keep: int) -> None:
        self._folder, self._run, self._service, self._keep = folder, run, service, keep

    def check(self) -> None:
        """Has the service look for an empty folder among the adapters, which it refuses only if it finds it: so it is
        known before anything is learnt, and not when the first version is there.

        Raises:
            OptionsError: it loads no adapters, or those of another folder.
            ServiceError: it may not be asked for it.
        """
        probe = self._folder / f"{self._run}-probe"
        probe.mkdir(parents=True, exist_ok=True)
        try:
            found = self._service.finds_adapter(probe.name)
        finally:
            probe.rmdir()
        if not found:
            raise OptionsError(
                f"--adapters: the service does not find what is published in {self._folder}: give the folder that it "
                "was started with (--adapters, on a disk that both see)"
            )

    def version(self, step: int) -> str:
        """What is served after ``step`` steps."""
        made = max((number for number in self._published() if number <= step), default=None)
        return BASE if made is None else self._name(made)

    def last_before(self, step: int) -> int:
        """Steps of the version before the one that was published at ``step``."""
        return max((number for number in self._published() if number < step), default=0)

    def age(self, version: str | None, step: int) -> int | None:
        """How many versions ``version`` is behind what is served after ``step`` steps; None if it is none of this
        run's.
        """
        run, _, number = (version or "").rpartition("-")
        if version != BASE and (run != self._run or not number.isdigit()):
            return None
        made = -1 if version == BASE else int(number)
        return sum(made < later <= step for later in self._published())

    def publish(self, step: int, checkpoint: Path) -> str:
        """The adapter of a checkpoint becomes a version. What has a name once never changes. Safe to do again."""
        copy_folder([checkpoint / file for file in FILES], self._folder / self._name(step))
        self.enforce(step)
        for number in self._published()[: -self._keep]:
            shutil.rmtree(self._folder / self._name(number))
        return self._name(step)

    def enforce(self, step: int) -> None:
        """Loads the version of ``step`` if the service has another one now, for instance after a restart."""
        self._service.load_policy(self.version(step))

    def _name(self, step: int) -> str:
        return f"{self._run}-{step:06d}"

    def _published(self) -> list[int]:
        """Steps of the versions in the folder, ascending."""
        found = (path.name.removeprefix(f"{self._run}-") for path in self._folder.glob(f"{self._run}-*"))
        return sorted(int(number) for number in found if number.isdigit())
