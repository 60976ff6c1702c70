"""Requests through the whole stack, for ``deploy/smoke.sh``: at least N, and until a file says that it is enough; not
one may fail.

``smoke_load.py URL KEY N STOP_FILE`` uses the client as people do, with its own retries; it prints what was sent again,
and ends with 1 if any call failed or any score was missing.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from pathlib import Path

from inward_client import AsyncInward, InwardError, Retries

CALLERS = 4
WORDS = (
    "how do I open a lock bake bread write letters with care without harm that sounds like no please ask again later"
).split()


class Load:
    """What was sent, and what came of it."""

    def __init__(self, client: AsyncInward) -> None:
        self.client = client
        self.done = 0
        self.failed: list[str] = []

    async def one(self, number: int) -> None:
        """One call, of the kind whose turn it is; every text is new."""
        rng = random.Random(number)

        def text() -> str:
            return f"{number} " + " ".join(rng.choices(WORDS, k=rng.randint(5, 20)))

        pairs = [{"prompt": text(), "chosen": text(), "rejected": text()} for _ in range(2)]
        items = [{"prompt": text(), "response": text()} for _ in range(2)]
        match number % 5:
            case 0:
                complete = all(margin.margin is not None for margin in (await self.client.margin(pairs)).margins)
            case 1:
                complete = all(score.score is not None for score in (await self.client.score(items)).scores)
            case 2:
                complete = all(reward.margin is not None for reward in (await self.client.reward_pairs(pairs)).rewards)
            case 3:
                complete = len((await self.client.rerank(text(), [text() for _ in range(4)])).results) == 4
            case _:
                answer = await self.client.rerank(
                    text(), n=2, sampling={"max_tokens": 6, "seed": number}, head="hybrid"
                )
                complete = len(answer.results) == 2
        if not complete:
            raise InwardError("an item has no score")

    async def caller(self, first: int, least: int, stop: Path) -> None:
        """Calls ``first``, ``first + CALLERS`` … until it is enough."""
        number = first
        while self.done < least or not stop.exists():  # noqa: ASYNC240 one look at a file is nothing beside a call
            try:
                await self.one(number)
            except InwardError as error:
                self.failed.append(f"call {number}: {type(error).__name__}: {error}")
            self.done += 1
            number += CALLERS


async def main(url: str, key: str, least: int, stop: Path) -> int:
    """Exit status."""
    started = time.monotonic()
    retries = Retries(patience=60.0, first=0.2, cap=5.0)
    async with AsyncInward(url, api_key=key, retries=retries) as client:
        load = Load(client)
        await asyncio.gather(*(load.caller(first, least, stop) for first in range(CALLERS)))
    print(
        f"{load.done} calls in {time.monotonic() - started:.0f} s, {len(load.failed)} failed",
        *load.failed[:10],
        sep="\n  ",
    )
    return 1 if load.failed else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))))
