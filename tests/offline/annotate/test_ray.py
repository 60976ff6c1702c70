"""An actor by itself, as Ray makes and calls it, and where Ray is installed some that die of a row."""

import json
from collections import Counter
from contextlib import asynccontextmanager

from inward.offline.annotate.ray import ALONE_TRIES, DEADLY, Actor, AnnotateCluster
from inward.offline.annotate.scorer import COLUMNS, Annotated
from inward.offline.annotate.work import Done, chunks
from inward.offline.cluster import TRIES
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
    parts = chunks([10], 4)
    actor = Actor(opened, sources, recognise(rows))
    done = {}
    for number in (2, 0, 1):
        done[number] = Done.decode(actor.do(parts[number]))
    actor._loop.run(actor._stack.aclose())
    actor._loop.close()
    margins = [row.columns["margin"] for number in sorted(done) for row in done[number].rows]
    assert margins == [float(n) for n in range(2, 12)]


def dying(log):
    """A scorer whose process ends at an answer that says so. By value: Ray's processes do not have this file."""

    def die(rows):
        import os
        from pathlib import Path

        with Path(log).open("a") as file:
            file.write(f"{rows}\n")
        os._exit(1)

    @asynccontextmanager
    async def opened():
        from inward.offline.annotate.scorer import COLUMNS, Annotated

        class Dying:
            tokens = None

            async def annotate(self, pairs):
                if any("deadly" in pair.chosen for pair in pairs):
                    die(len(pairs))
                return [Annotated(dict.fromkeys(COLUMNS) | {"margin": float(len(p.chosen))}) for p in pairs], {"by": 1}

        yield Dying()

    return opened


def test_a_row_that_every_actor_dies_of_is_the_only_one_that_is_lost_and_says_so(tmp_path, some_actors):
    rows = [{"prompt": "p", "chosen": "a" * n + "deadly" * (n == 10), "rejected": "b"} for n in range(1, 18)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts, kept = chunks([17], 8), {}
    log = tmp_path / "log"
    cluster = AnnotateCluster(dying(str(log)), find(tmp_path / "in.jsonl"), recognise(rows), actors=2, gpus=0)
    with cluster:
        cluster.work(parts, lambda chunk, done: kept.setdefault(chunk.number, done))
    found = [row for part in parts for row in kept[part.number].rows]
    assert [row.columns and row.columns["margin"] for row in found] == [n if n != 10 else None for n in range(1, 18)]
    assert [row.error for row in found if row.error] == [DEADLY] and found[9].error == DEADLY
    assert {part.number: part.rows for part in parts} == {number: len(done.rows) for number, done in kept.items()}
    assert all(done.by == {"by": 1} for done in kept.values())
    died = Counter(map(int, log.read_text().split()))
    assert died.pop(8) in (TRIES, TRIES + 1)  # once perhaps with another chunk in hand
    assert died == {4: 1, 2: 1, 1: ALONE_TRIES}
