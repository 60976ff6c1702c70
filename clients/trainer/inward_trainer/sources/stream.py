"""Scored pairs from the service's stream in Redis, as they come.

The service appends them to ``inward:{<queue>}:scores:<name>``, an entry's field ``row`` being one pair as JSON. They
are read as a consumer group, so several trainers share a stream, and acknowledged when a checkpoint holds what was
learnt from them.

Entries reach one consumer in the order of their ids. So the id of the last one taken, which the loop writes down, says
of every entry whether it was taken: also when a Redis that lost its last second gives some again.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import redis
from redis.exceptions import ConnectionError, ResponseError, TimeoutError

from inward_trainer.errors import DataError, TrainerError
from inward_trainer.pairs import ScoredPair, read_row
from inward_trainer.sources.base import Cursor, Ended, Taken

LOG = logging.getLogger(__name__)
BLOCK = 1000
"""Milliseconds for which one read waits at the server."""
BEGINNING = "0"


class Stream:
    """See the module. The cursor is the id of the last entry taken.

    Args:
        url: of Redis.
        key: of the stream.
        group: consumers of one group share the entries among them.
        consumer: whose entries come back after a crash; two trainers of one group must differ in it.
        idle: seconds without an entry after which the stream counts as ended; None waits for ever.
        patience: seconds for which a Redis that does not answer is waited for.
    """

    live = True

    def __init__(
        self, url: str, key: str, *, group: str, consumer: str, idle: float | None = None, patience: float = 600.0
    ) -> None:
        self._redis: Any = redis.Redis.from_url(
            url, decode_responses=True, socket_timeout=BLOCK / 1000 + 10, protocol=2
        )
        self._key, self._group, self._consumer = key, group, consumer
        self._idle, self._patience = idle, patience
        self._recovered = False

    def close(self) -> None:
        """Leaves entries that were taken and not settled to the next trainer of this name."""
        self._redis.close()

    def take(self, n: int, cursor: Cursor) -> Taken:
        """Those that an earlier process took and did not write down, then new ones."""
        last = str(cursor or BEGINNING)
        end = None if self._idle is None else time.monotonic() + self._idle
        while True:
            entries = self._pending(n, last) or self._new(n)
            pairs, receipts = self._read(entries, last)
            if pairs:
                return Taken(tuple(pairs), receipts[-1], tuple(receipts))
            if entries:
                last = max(last, entries[-1][0], key=_ordered)
            elif end is not None and time.monotonic() > end:
                raise Ended

    def settle(self, receipts: Sequence[str]) -> None:
        """Acknowledges them."""
        if receipts:
            self._ask(lambda: self._redis.xack(self._key, self._group, *receipts))

    def _pending(self, n: int, last: str) -> list[Any]:
        if self._recovered:
            return []
        entries = self._read_group(n, last)
        self._recovered = not entries
        return entries

    def _new(self, n: int) -> list[Any]:
        return self._read_group(n, ">")

    def _read_group(self, n: int, after: str) -> list[Any]:
        found = self._ask(
            lambda: self._redis.xreadgroup(self._group, self._consumer, {self._key: after}, count=n, block=BLOCK)
        )
        return list(found[0][1]) if found else []

    def _read(self, entries: list[Any], last: str) -> tuple[list[ScoredPair], list[str]]:
        """Pairs of the entries after ``last``, and the receipts of all that were taken now; what is no pair is
        acknowledged at once.
        """
        pairs: list[ScoredPair] = []
        receipts: list[str] = []
        useless: list[str] = []
        for entry, fields in entries:
            if _ordered(entry) <= _ordered(last):
                continue  # written down by an earlier process, which acknowledges it with its checkpoint
            if not fields:
                LOG.warning("entry %s was dropped from the full stream before it was used", entry)
                useless.append(entry)
                continue
            try:
                pairs.append(read_row(json.loads(fields["row"]), entry, as_scored=True))
            except (DataError, ValueError, KeyError) as error:
                LOG.warning("entry %s is no pair and is left out: %s", entry, error)
                useless.append(entry)
            else:
                receipts.append(entry)
        self.settle(useless)
        return pairs, receipts

    def _ask(self, command: Callable[[], Any]) -> Any:
        end, pause = time.monotonic() + self._patience, 0.1
        while True:
            try:
                return command()
            except ResponseError as error:
                if "NOGROUP" not in str(error):
                    raise TrainerError(f"Redis does not give {self._key}: {error}") from None
                self._create_group()
            except (ConnectionError, TimeoutError) as error:
                if time.monotonic() + pause > end:
                    raise TrainerError(f"no answer from Redis for {self._patience:.0f} s: {error}") from None
                time.sleep(pause)
                pause = min(2 * pause, 5.0)

    def _create_group(self) -> None:
        try:
            self._redis.xgroup_create(self._key, self._group, BEGINNING, mkstream=True)
        except ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise


def _ordered(entry: str) -> tuple[int, int]:
    milliseconds, _, number = entry.partition("-")
    return int(milliseconds), int(number or 0)
