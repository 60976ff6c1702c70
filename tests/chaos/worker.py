"""``inward worker`` whose fake backbone takes its time and dies of poison: for the chaos tests, run as a script."""

import os
import sys

from inward.__main__ import main
from inward.backbones.fake import FakeBackbone

SECONDS_PER_TOKEN = float(os.environ.get("CHAOS_SECONDS_PER_TOKEN", "0"))
POISON = tuple(int(i) for i in os.environ.get("CHAOS_POISON", "").split(",") if i)
"""Token ids; a response that begins with them ends the process, as a crash in a kernel would."""


class SlowAndMortal(FakeBackbone):
    def __init__(self, *args, **options):
        super().__init__(*args, **{**options, "delay_per_token": SECONDS_PER_TOKEN})

    async def read(self, groups, readouts, *, tokens=False):
        if POISON and any(ids[: len(POISON)] == POISON for group in groups for ids in group.responses_ids):
            os._exit(139)
        return await super().read(groups, readouts, tokens=tokens)


if __name__ == "__main__":
    import inward.processes.wiring

    inward.processes.wiring.FakeBackbone = SlowAndMortal
    sys.exit(main(["worker", *sys.argv[1:]]))
