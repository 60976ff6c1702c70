"""Scored rows as streams that trainers consume with consumer groups; ``docs/scores.md`` shows how.

A stream is bounded twice: the oldest rows go first, and one to which nothing was appended for ``keep`` seconds is
forgotten.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

from inward.stores.connection import Connection
from inward.stores.keys import Keys

MOST_SCORES = 100_000
"""Rows of one stream, about."""

APPEND = """
-- KEYS: scores.  ARGV: most rows, seconds to keep, then rows.
for i = 3, #ARGV do redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[1], '*', 'row', ARGV[i]) end
redis.call('EXPIRE', KEYS[1], ARGV[2])
"""


class ScoreStreams:
    """The ``scores:<name>`` streams of one queue, as ``/rerank`` appends to them (bulk jobs do so in a script of
    their own).
    """

    def __init__(self, connection: Connection, keys: Keys, *, keep: float, most: int = MOST_SCORES) -> None:
        self._redis, self._keys, self._keep, self._most = connection, keys, ceil(keep), most

    async def append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends ``rows``, all or none.

        Raises:
            Unavailable: Redis is away or full.
        """
        await self._redis.script(APPEND, [self._keys.scores(name)], [self._most, self._keep, *map(json.dumps, rows)])
