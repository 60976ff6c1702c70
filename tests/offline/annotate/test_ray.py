"""An actor by itself, as Ray makes and calls it; the cluster is tested where Ray is installed (tests/commands)."""

import json
from contextlib import asynccontextmanager

from inward.offline.annotate.ray import Actor
from inward.offline.annotate.scorer import COLUMNS, Annotated
from inward.offline.annotate.work import Done, chunks
from inward_client.rows import find, recognise


class Scorer:
    """The margin is the length of the chosen answer."""

    tokens = None

    async def annotate(self, pairs):
        return [Annotated(dict.fromkeys(COLUMNS) | {"margin": float(len(pair.chosen))}) for pair in pairs], None


@asynccontextmanager
async def opened():
    yield Scorer()


def test_an_actor_does_the_chunks_that_it_is_given_whatever_their_order(tmp_path):
    rows = [{"prompt": "p", "chosen": "a" * n, "rejected": "b"} for n in range(2, 12)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = find(tmp_path / "in.jsonl")
    by_number = {chunk.number: chunk for chunk in chunks([10], 4)}
    actor = Actor(opened, sources, recognise(rows), by_number)
    done = {}
    for number in (2, 0, 1):
        done[number] = Done.decode(actor.do(number))
    actor._loop.run(actor._stack.aclose())
    actor._loop.close()
    margins = [row.columns["margin"] for number in sorted(done) for row in done[number].rows]
    assert margins == [float(n) for n in range(2, 12)]
