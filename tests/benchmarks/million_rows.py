"""Whether ``inward annotate`` holds a million pairs: seconds, peak memory and the size of the page, by number of rows.

Pairs of a few words are made, each another one, and annotated in a process of its own, whose resident memory is looked
at four times a second. By default nobody reads them: a stand-in draws the scores, and all the rest (reading, progress,
estimates, duplicates, output, page) is what the command does. So what is measured is what grows with rows, and not a
model. ``--scores toy`` and ``--scores fake`` take the toy, or the fake backbone in its place; they are slow.

    python tests/benchmarks/million_rows.py --rows 10000 100000 1000000
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inward.offline.annotate import run
from inward.offline.annotate.options import AnnotateOptions, add_arguments
from inward.offline.annotate.scorer import COLUMNS, Annotated, Annotator, Scorer
from inward_client.rows import Pair

LOOK_INTERVAL_S = 0.25
WORDS = "help the cat open a door and ask who lives there now before you go home with this old key again".split()
MIB = 2**20


@dataclass
class Seen:
    """Of one run."""

    rows: int
    seconds: float = 0.0
    rss: list[float] = field(default_factory=list)
    """MiB, over time."""
    page_mib: float = 0.0
    status: int = 0

    @property
    def after_start(self) -> float:
        """When a twentieth of the run is over: the model is loaded, and few rows are read."""
        return self.rss[len(self.rss) // 20] if self.rss else 0.0


def main() -> int:
    """The exit status: of the first run that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--scores", default="stand-in", choices=["stand-in", "fake", "toy"])
    parser.add_argument("--page-rows", type=int, default=2000)
    if sys.argv[1:2] == ["--stand-in"]:
        return stand_in(sys.argv[2:])
    args = parser.parse_args()
    print(f"scores by {args.scores}, page of {args.page_rows} pairs")
    print("      rows   seconds  rows/s  MiB at a twentieth  peak MiB  page MiB", flush=True)
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            seen = annotate(Path(folder), rows, args.scores, args.page_rows)
        if seen.status:
            return seen.status
        print(
            f"{rows:10,} {seen.seconds:9.1f} {rows / seen.seconds:7.0f} {seen.after_start:19.0f} "
            f"{max(seen.rss):9.0f} {seen.page_mib:9.2f}",
            flush=True,
        )
    return 0


def annotate(folder: Path, rows: int, scores: str, page_rows: int) -> Seen:
    """One run of the command, with all that costs memory and needs no states."""
    source, page = folder / "pairs.jsonl", folder / "page.html"
    make(source, rows)
    ours = [sys.executable, "-m", "inward", "annotate"]
    models = {"toy": ["--model", "toy"], "fake": ["--model", "toy", "--backbone", "fake"], "stand-in": []}
    if scores == "stand-in":
        ours = [sys.executable, __file__, "--stand-in"]
    options = ["--html", str(page), "--page-rows", str(page_rows), "--by", "source", "--suspicious", "3"]
    command = [*ours, str(source), str(folder / "out.jsonl"), *models[scores], *options]
    seen, began = Seen(rows), time.monotonic()
    with (folder / "said").open("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=os.environ)
        threading.Thread(target=_look, args=(process, seen), daemon=True).start()
        seen.status = process.wait()
        seen.seconds = time.monotonic() - began
        if seen.status:
            said.seek(0)
            print(said.read()[-4000:], file=sys.stderr)
    seen.page_mib = page.stat().st_size / MIB if page.exists() else 0.0
    return seen


class StandIn:
    """``Scorer``: a hash of the texts gives the scores; most labels agree."""

    tokens = 4096

    async def annotator(self) -> Annotator:
        head = {"name": "stand-in", "kind": "legend", "version": 1}
        return Annotator("none", "", "", "", "base", "", head, None, "")

    async def annotate(self, pairs: Sequence[Pair]) -> tuple[list[Annotated], dict[str, Any]]:
        by = {"head": (await self.annotator()).head, "policy_version": "base", "confidence_head": None}
        return [Annotated(self._columns(pair)) for pair in pairs], by

    @staticmethod
    def _columns(pair: Pair) -> dict[str, float | bool | None]:
        digest = hashlib.blake2b(f"{pair.prompt}\n{pair.chosen}\n{pair.rejected}".encode(), digest_size=8).digest()
        margin = random.Random(digest).gauss(1.0, 1.0)
        told: dict[str, float | bool | None] = dict.fromkeys(COLUMNS)
        told |= {"margin": margin, "chosen_score": margin, "rejected_score": 0.0, "label_agrees": margin > 0}
        return told | {"label_probability": 1 / (1 + math.exp(-2 * margin))}

    async def token_scores(self, pairs: Sequence[Pair]) -> list[None]:
        return [None] * len(pairs)

    async def states(self, pairs: Sequence[Pair]) -> Any:
        raise NotImplementedError


def stand_in(options: Sequence[str]) -> int:
    """The command with a ``StandIn``."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)

    @asynccontextmanager
    async def opened() -> AsyncIterator[Scorer]:
        yield StandIn()

    return run.annotate(AnnotateOptions.of(parser.parse_args(options)), opened)


def make(path: Path, rows: int) -> None:
    """Pairs of a few words; one in fifty repeats an earlier one, and one in twenty is longer."""
    random.seed(0)
    with path.open("w", encoding="utf-8") as file:
        for n in range(rows):
            number = n if n % 50 else n // 2
            draw = random.Random(number)
            words = [" ".join(draw.choices(WORDS, k=draw.choice([3, 4, 5]))) for _ in range(3)]
            row = {
                "prompt": f"{words[0]} {number // 2}", "chosen": words[1], "rejected": f"{words[2]} {number}",
                "source": f"s{n % 7}",
            }  # fmt: skip
            file.write(json.dumps(row) + "\n")


def _look(process: subprocess.Popen[bytes], seen: Seen) -> None:
    while process.poll() is None:
        try:
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            return
        seen.rss.append(pages * os.sysconf("SC_PAGE_SIZE") / MIB)
        time.sleep(LOOK_INTERVAL_S)


if __name__ == "__main__":
    raise SystemExit(main())
