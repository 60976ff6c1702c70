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
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, ConnectionError, ResponseError, TimeoutError
from redis.retry import Retry

from inward_trainer.errors import DataError, OptionsError, TrainerError
from inward_trainer.pairs import ScoredPair, read_row
from inward_trainer.sources.base import Cursor, Ended, Taken
from inward_trainer.stopping import Stopping

LOG = logging.getLogger(__name__)
BLOCK_MS = 1000
"""For which one read waits at the server."""
BEGINNING = "0"
CLAIM_S = 30
"""For which a consumer's name is a run's after the run was last heard of."""
TOLD_S = 30.0
"""Between two lines in the log while nothing comes."""


class StreamedPairs:
    """See the module. The cursor is the id of the last entry taken.

    Args:
        url: of Redis.
        key: of the stream.
        group: consumers of one group share the entries among them.
        consumer: whose entries come back after a crash; two trainers of one group must differ in it.
        run: the run that reads under this name.
        idle: seconds without an entry after which the stream counts as ended; None waits for ever.
        patience: seconds for which a Redis that does not answer is waited for.
        stopping: ends waits.

    Raises:
        OptionsError: another run reads under this name.
    """

    live = True

    def __init__(
        self,
        url: str,
        key: str,
        *,
        group: str,
        consumer: str,
        run: str = "",
        idle: float | None = None,
        patience: float = 600.0,
        stopping: Stopping | None = None,
    ) -> None:
        try:
            self._redis: Any = redis.Redis.from_url(
                url, decode_responses=True, socket_timeout=BLOCK_MS / 1000 + 10, protocol=2,
                retry=Retry(NoBackoff(), 0),  # ours looks at what a lost reply had delivered first
            )  # fmt: skip
        except ValueError:  # whose text may hold parts of a password
            raise OptionsError(
                "--redis-url can't be used: it needs a form such as redis://user:password@host:6379/0; in a password, "
                "write / # ? @ : % as %2F %23 %3F %40 %3A %25"
            ) from None
        self._key, self._group, self._consumer = key, group, consumer
        self._idle, self._patience = idle, patience
        self._stopping = stopping or Stopping()
        self._recovered = self._begun = False
        self._claim = _Claim(url, f"{key}:consumer:{group}:{consumer}", run or consumer)
        self._ask(self._claimed)

    def close(self) -> None:
        """Leaves entries that were taken and not settled to the next trainer of this name."""
        self._claim.close()
        self._redis.close()

    def take(self, n: int, cursor: Cursor) -> Taken:
        """Those that an earlier process took and did not write down, then new ones.

        Raises:
            OptionsError: nobody writes such a stream.
            Stopped: somebody asked for it.
        """
        last = str(cursor or BEGINNING)
        self._wait_until_it_is_there()
        end = None if self._idle is None else time.monotonic() + self._idle
        told = time.monotonic()
        while True:
            self._stopping.check()
            entries = self._ask(partial(self._next, n, last))
            pairs, receipts = self._read(entries, last)
            if pairs:
                return Taken(tuple(pairs), receipts[-1], tuple(receipts))
            if entries:
                last = max(last, entries[-1][0], key=_ordered)
            elif end is not None and time.monotonic() > end:
                raise Ended
            elif time.monotonic() > told + TOLD_S:
                told = time.monotonic()
                LOG.info("waiting for pairs: nothing new in %s", self._key)

    def settle(self, receipts: Sequence[str]) -> None:
        """Acknowledges them."""
        if receipts:
            self._ask(lambda: self._redis.xack(self._key, self._group, *receipts))

    def _wait_until_it_is_there(self) -> None:
        """A stream begins with its first entry. One that does not begin has another name, or no writer."""
        patience = self._patience if self._idle is None else self._idle
        end = time.monotonic() + patience
        while not self._begun:
            self._begun = bool(self._ask(lambda: self._redis.exists(self._key)))
            if self._begun:
                return
            if time.monotonic() > end:
                there = sorted(self._ask(lambda: list(self._redis.scan_iter("inward:{*}:scores:*", _type="stream"))))
                raise OptionsError(
                    f"nobody wrote to the stream {self._key} within {patience:.0f} s: see --stream, and --queue. "
                    f"Streams there: {', '.join(there) or 'none'}"
                )
            self._stopping.sleep(min(1.0, patience))

    def _claimed(self) -> None:
        if not self._claim.take(self._stopping):
            raise OptionsError(
                f"another run, {self._claim.holder}, reads {self._key} as consumer {self._consumer} of group "
                f"{self._group}: choose another --consumer"
            )

    def _next(self, n: int, last: str) -> list[Any]:
        """Own entries after ``last`` that are pending, or else new ones. What a reply that was lost on its way had
        delivered is pending, so after an error pending ones are looked at again.
        """
        if not self._recovered and (entries := self._read_group(n, last)):
            return entries
        self._recovered = False
        entries = self._read_group(n, ">")
        self._recovered = True
        return entries

    def _read_group(self, n: int, after: str) -> list[Any]:
        found = self._redis.xreadgroup(self._group, self._consumer, {self._key: after}, count=n, block=BLOCK_MS)
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
            except AuthenticationError:
                raise OptionsError("--redis-url: Redis refuses the name or password") from None
            except (ConnectionError, TimeoutError) as error:
                if time.monotonic() + pause > end:
                    raise TrainerError(f"no answer from Redis for {self._patience:.0f} s: {error}") from None
                LOG.info("Redis does not answer, and is asked again in %.1f s", pause)
                self._stopping.sleep(pause)
                pause = min(2 * pause, 5.0)

    def _create_group(self) -> None:
        try:
            self._redis.xgroup_create(self._key, self._group, BEGINNING, mkstream=True)
        except ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise


class _Claim:
    """A consumer's name as one run's own: a key that lives for as long as somebody renews it.

    A folder has one trainer at a time, so whoever comes with the run's own name is the run itself, started again.
    """

    def __init__(self, url: str, key: str, run: str) -> None:
        self._redis: Any = redis.Redis.from_url(url, decode_responses=True, socket_timeout=10, protocol=2)
        self._key, self._run = key, run
        self._closed = threading.Event()
        self._renewing: threading.Thread | None = None
        self.holder = ""
        """Who has it, where it is somebody else."""

    def take(self, stopping: Stopping) -> bool:
        """Whether it is this run's now; one that was killed lets go of it a little later."""
        end = time.monotonic() + CLAIM_S + 1
        while not self._redis.set(self._key, self._run, nx=True, ex=CLAIM_S):
            self.holder = self._redis.get(self._key) or ""
            if self.holder == self._run:
                break
            if time.monotonic() > end:
                return False
            stopping.sleep(0.5)
        self._renewing = threading.Thread(target=self._renew, name="consumer-claim", daemon=True)
        self._renewing.start()
        return True

    def close(self) -> None:
        """Lets go of it."""
        self._closed.set()
        if self._renewing is not None:
            self._renewing.join()
            with suppress(redis.RedisError):
                self._redis.delete(self._key)
        self._redis.close()

    def _renew(self) -> None:
        while not self._closed.wait(CLAIM_S / 3):
            with suppress(redis.RedisError):  # it comes back, or the entries are another's
                self._redis.set(self._key, self._run, ex=CLAIM_S)


def _ordered(entry: str) -> tuple[int, int]:
    milliseconds, _, number = entry.partition("-")
    return int(milliseconds), int(number or 0)
