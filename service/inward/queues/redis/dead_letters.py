"""Dead letters: jobs that were given up because they ended several workers, or because nobody could read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from inward import codec
from inward.stores.connection import Connection
from inward.stores.keys import Keys
from inward.types import Job


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One dead letter. ``entry`` names it; its first part is the Unix time in milliseconds at which it was given up."""

    entry: str
    job_id: str
    reason: str
    deliveries: int
    data: bytes

    @property
    def job(self) -> Job | None:
        """None where it can't be read."""
        try:
            return codec.decode_job(self.data)
        except codec.Unreadable:
            return None


class DeadLetters:
    """The dead letters of one queue. Raises ``Unavailable`` where Redis is away."""

    def __init__(self, connection: Connection, keys: Keys) -> None:
        self._redis, self._keys = connection, keys

    async def all(self) -> list[DeadLetter]:
        """Oldest first."""
        found = await self._redis("XRANGE", self._keys.dead, "-", "+")
        return [
            DeadLetter(
                entry.decode(),
                fields[b"id"].decode(),
                fields[b"reason"].decode(errors="replace"),
                int(fields[b"deliveries"]),
                fields[b"job"],
            )
            for entry, fields in found
        ]

    async def drop(self, entries: Sequence[str]) -> int:
        """Deletes letters; how many of them there were."""
        return int(await self._redis("XDEL", self._keys.dead, *entries)) if entries else 0
