"""Which version of the policy, a LoRA adapter, the backbone carries: switched, remembered and listed; in the process
that owns the backbone, and as an API replica sees it.

A version is the name of a folder in the adapters folder, and ``base`` is the backbone as it was loaded. What a name
stands for must not change once it was published.
"""

from __future__ import annotations

import asyncio
import datetime
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inward import metrics
from inward.backbones.base import Backbone
from inward.backbones.peft_files import CONFIG, TENSORS
from inward.errors import Conflict, InvalidField, NotFound
from inward.types import BASE

if TYPE_CHECKING:
    from inward.control.remote import RemoteHeadControl

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
REMEMBERED = 100
"""Activations that are told; the oldest are forgotten first."""


@dataclass(frozen=True, slots=True)
class Activation:
    """A version, and when the backbone began to carry it (ISO 8601, UTC)."""

    policy_version: str
    activated: str

    @classmethod
    def now(cls, version: str) -> Activation:
        now = datetime.datetime.now(datetime.UTC)
        return cls(version, now.isoformat(timespec="milliseconds").replace("+00:00", "Z"))


History = tuple[Activation, ...]
"""The newest last; its version is what is carried."""


class LocalPolicyControl:
    """See the module; one for each process that owns a backbone.

    Args:
        folder: of the adapters, one folder each as PEFT saves them; None serves the base only.
    """

    def __init__(self, backbone: Backbone, folder: Path | None) -> None:
        self._backbone, self._folder = backbone, folder
        self._one_switch_at_a_time = asyncio.Lock()
        self.history: History = (Activation.now(backbone.policy_version),)
        self._observe()

    async def begin(self, version: str) -> None:
        """Carries ``version`` as if it had been carried from the start. Raises as ``switch`` does."""
        await self._carry(version)
        self.history = (Activation.now(version),)

    async def show(self) -> dict[str, Any]:
        """What ``GET /policy`` answers."""
        previous = self.history[-2].policy_version if len(self.history) > 1 else None
        return {
            "policy_version": self.history[-1].policy_version,
            "previous": previous,
            "available": [BASE, *await asyncio.to_thread(self._available)],
            "history": [asdict(activation) for activation in self.history],
        }

    async def switch(self, version: str) -> dict[str, Any]:
        """Carries ``version`` for every batch that begins from now on. What is carried already is not loaded again.

        Raises:
            InvalidField: the name or the adapter can't be used, or does not fit the backbone; the former version stays.
            NotFound: there is no such version.
            Conflict: there is no adapters folder.
        """
        async with self._one_switch_at_a_time:
            if version != self._backbone.policy_version:
                await self._carry(version)
                self.history = (*self.history, Activation.now(version))[-REMEMBERED:]
        return await self.show()

    async def follow(self, history: Sequence[Activation]) -> None:
        """Carries what another process switched to, and takes over its history.

        Raises:
            InwardError: as ``switch``; nothing has changed.
        """
        async with self._one_switch_at_a_time:
            if (version := history[-1].policy_version) != self._backbone.policy_version:
                await self._carry(version)
            self.history = tuple(history)

    async def _carry(self, version: str) -> None:
        folder = None if version == BASE else await asyncio.to_thread(self._find, version)
        await self._backbone.load_adapter(version, folder)
        metrics.POLICY_SWITCHES_TOTAL.inc()
        self._observe()

    def _find(self, version: str) -> Path:
        if not NAME.fullmatch(version):
            raise InvalidField(
                "a policy version is 1 to 128 letters, digits, dots, dashes and underscores", param="version"
            )
        if self._folder is None:
            raise Conflict(
                "there is no adapters folder to load a policy from: name one with --adapters", param="version"
            )
        root = self._folder.expanduser().resolve()
        found = root / version
        if not found.is_dir():
            there = ", ".join(self._available()[-10:]) or "none"
            raise NotFound(
                f"there is no adapter {version!r} in the adapters folder; available: {there}", param="version"
            )
        if not all(path.resolve().is_relative_to(root) for path in (found, found / CONFIG, found / TENSORS)):
            raise InvalidField(f"adapter {version!r} leads out of the adapters folder", param="version")
        return found

    def _available(self) -> list[str]:
        """Names of what looks like an adapter; whether it can be used is seen when it is loaded."""
        if self._folder is None or not (folder := self._folder.expanduser()).is_dir():
            return []
        return sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}") if NAME.fullmatch(path.parent.name))

    def _observe(self) -> None:
        metrics.POLICY_INFO.clear()
        metrics.POLICY_INFO.labels(version=self._backbone.policy_version).set(1)


class RemotePolicyControl:
    """The policy as an API replica sees it: a worker is asked, since only workers have the adapters."""

    def __init__(self, workers: RemoteHeadControl) -> None:
        self._workers = workers

    async def show(self) -> dict[str, Any]:
        return dict((await self._workers.ask("policy", {}))["policy"])

    async def switch(self, version: str) -> dict[str, Any]:
        policy = dict((await self._workers.ask("switch_policy", {"version": version}))["policy"])
        await self._workers.until_all(
            lambda worker_info: worker_info.policy_version == policy["policy_version"],
            policy_version=policy["policy_version"],
        )
        return policy
