"""Dead letters: jobs that were given up because they ended several workers, or because nobody could read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from inward import codec
from inward.errors import NotFound, SetupError
from inward.stores.connection import Connection
from inward.stores.keys import Keys
from inward.types import Job


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One dead letter. ``entry`` names it: the Unix time in milliseconds at which it was given up, a number, and in
    another Redis than the first ``@`` and which.
    """

    entry: str
    job_id: str
    reason: str
    deliveries: int
    data: bytes
    backbone: str | None = None
    """What the queue was served with when it was given up."""

    @property
    def given_up(self) -> float:
        """Unix seconds."""
        return int(self.entry.partition("-")[0]) / 1000

    @property
    def job(self) -> Job | None:
        """None where it can't be read."""
        try:
            return codec.decode_job(self.data)
        except codec.Unreadable:
            return None

    def described(self) -> dict[str, Any]:
        """What `list` prints of it: no text."""
        job = self.job
        given_up = datetime.fromtimestamp(self.given_up, UTC)
        return {
            "entry": self.entry, "given_up": given_up.isoformat(timespec="seconds"), "job": self.job_id,
            "deliveries": self.deliveries, "reason": self.reason,
            "heads": list(job.heads) if job else None, "tokens": job.group.tokens if job else None,
        }  # fmt: skip


class DeadLetters:
    """The dead letters of one queue, which has one Redis or several. Raises ``Unavailable`` where Redis is away."""

    def __init__(self, connections: Sequence[Connection], keys: Keys) -> None:
        self._shards, self._keys = connections, keys

    async def all(self) -> list[DeadLetter]:
        """Oldest first."""
        letters = [letter for shard in range(len(self._shards)) for letter in await self._of(shard)]
        return sorted(letters, key=lambda letter: letter.given_up)

    async def _of(self, shard: int) -> list[DeadLetter]:
        found = await self._shards[shard]("XRANGE", self._keys.dead, "-", "+")
        return [
            DeadLetter(
                entry.decode() + (f"@{shard + 1}" if shard else ""),
                fields[b"id"].decode(),
                fields[b"reason"].decode(errors="replace"),
                int(fields[b"deliveries"]),
                fields[b"job"],
                fields[b"backbone"].decode() if b"backbone" in fields else None,
            )
            for entry, fields in found
        ]

    async def chosen(self, entries: Sequence[str], *, everything: bool = False) -> list[DeadLetter]:
        """Those of these entries.

        Raises:
            NotFound: an entry isn't there.
            SetupError: none is named.
        """
        if not entries and not everything:
            raise SetupError("name the entries as `inward dead-letters list` prints them, or say --all")
        there = {letter.entry: letter for letter in await self.all()}
        if missing := [entry for entry in entries if entry not in there]:
            raise NotFound(
                f"there is no dead letter {missing[0]}; `inward dead-letters list` prints those that there are"
            )
        return list(there.values()) if everything else [there[entry] for entry in entries]

    async def drop(self, entries: Sequence[str]) -> int:
        """Deletes letters; how many of them there were."""
        dropped = 0
        for entry in entries:
            name, _, shard = entry.partition("@")
            dropped += int(await self._shards[int(shard or 1) - 1]("XDEL", self._keys.dead, name))
        return dropped
