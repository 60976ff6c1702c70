"""``inward worker`` whose fake backbone takes its time, and dies of poison or hangs: for the chaos tests, run as a
script."""

import asyncio
import os
import sys
import threading

from inward.__main__ import main
from inward.backbones.fake import FakeBackbone

SECONDS_PER_TOKEN = float(os.environ.get("CHAOS_SECONDS_PER_TOKEN", "0"))
POISON = tuple(int(i) for i in os.environ.get("CHAOS_POISON", "").split(",") if i)
"""Token ids; a response that begins with them ends the process, as a crash in a kernel would."""
HANGS = bool(os.environ.get("CHAOS_HANGS"))
"""Poison does not end the process, but its device: a call that never comes back."""


class SlowAndMortal(FakeBackbone):
    def __init__(self, *args, **options):
        super().__init__(*args, **{**options, "delay_per_token": SECONDS_PER_TOKEN})

    async def read(self, groups, readouts, *, tokens=False):
        if POISON and any(ids[: len(POISON)] == POISON for group in groups for ids in group.responses_ids):
            if not HANGS:
                os._exit(139)
            self._alive = False  # as a backbone says whose device makes no progress
            await forever()
        return await super().read(groups, readouts, tokens=tokens)

    async def close(self):
        if HANGS and not self._alive:
            await forever()
        await super().close()


async def forever():
    """In a thread, which nothing ends."""
    await asyncio.to_thread(threading.Event().wait)


if __name__ == "__main__":
    import inward.processes.wiring

    inward.processes.wiring.FakeBackbone = SlowAndMortal
    inward.processes.wiring.LET_GO_S = 1.0
    sys.exit(main(["worker", *sys.argv[1:]]))
