"""Chunks to be done, and what is done: kept beside the output as it comes, so that a job which was stopped goes on
where it was.

    <out>.progress/job.json      what this job is: another input, model or head is another job
    <out>.progress/done.jsonl    one line for each chunk that is done, in the order in which they were

A line holds only what is added to its rows: it is small, and the rows are read again when everything is put together.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Self

from inward.errors import SetupError
from inward.files import write
from inward.offline.annotate.scorer import Annotated, Annotator, By, Scorer
from inward_client.rows import DataError, Pair, PairReader, Row, Source

MOST_ROWS = 256
"""Of a chunk."""
PASSES = 2
"""Forward passes of a chunk: enough to pack well, and seconds even on a processor."""
ROWS_AT_URL = 64
"""Of a chunk where passes are a service's affair."""
CHARACTERS_A_TOKEN = 4
"""About; it only decides how long a chunk takes."""
FLUSH_INTERVAL_S = 2.0
"""Between two writes to the disk."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows that are annotated together: ``rows`` of them from ``start`` on."""

    number: int
    source: int
    start: int
    rows: int

    def halves(self) -> list[Chunk]:
        """Its rows in two."""
        first = self.rows // 2
        return [replace(self, rows=first), replace(self, start=self.start + first, rows=self.rows - first)]


def chunks(counts: Sequence[int], size: int) -> list[Chunk]:
    """All rows of all sources, ``size`` at a time; a chunk never spans two sources."""
    places = [(source, start) for source, count in enumerate(counts) for start in range(0, count, size)]
    return [Chunk(n, source, start, min(size, counts[source] - start)) for n, (source, start) in enumerate(places)]


def chunk_rows(tokens: int | None, characters: float) -> int:
    """Rows of a chunk, the same for the same data and model.

    Args:
        tokens: of one forward pass; None where that is not known.
        characters: of a row, on average.
    """
    if tokens is None:
        return ROWS_AT_URL
    return max(1, min(MOST_ROWS, int(PASSES * tokens * CHARACTERS_A_TOKEN / max(characters, 1.0))))


class Cursor:
    """Reads chunks; going forwards costs nothing extra, going back starts the file anew."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self._rows: Iterator[Row | DataError] = iter(())
        self._at: tuple[int, int] | None = None

    def read(self, chunk: Chunk) -> list[Row | DataError]:
        """The chunk's rows, in order.

        Raises:
            DataError: there are fewer than there were.
        """
        source = self._sources[chunk.source]
        if self._at is None or self._at[0] != chunk.source or self._at[1] > chunk.start:
            self._rows, self._at = source.rows(chunk.start), (chunk.source, chunk.start)
        skipped = chunk.start - self._at[1]
        rows = list(islice(self._rows, skipped, skipped + chunk.rows))
        if len(rows) != chunk.rows:
            raise DataError(f"{source.paths[0]} has become shorter while it was read")
        self._at = (chunk.source, chunk.start + chunk.rows)
        return rows


@dataclass(frozen=True, slots=True)
class Done:
    """What became of a chunk's rows, and which versions of head and policy said so."""

    rows: list[Annotated]
    by: By | None

    def encode(self) -> bytes:
        """As JSON, without a line break."""
        return json.dumps([self.by, [[row.columns, row.error, row.truncated] for row in self.rows]]).encode()

    @classmethod
    def decode(cls, content: bytes) -> Done:
        """The inverse."""
        by, rows = json.loads(content)
        return cls([Annotated(*row) for row in rows], by)


async def do(scorer: Scorer, reader: PairReader, rows: Sequence[Row | DataError]) -> Done:
    """Annotates the rows of a chunk; one that can't be is an error in its place."""
    pairs: list[Pair | DataError] = []
    for row in rows:
        try:
            pairs.append(row if isinstance(row, DataError) else reader.pair(row))
        except DataError as error:
            pairs.append(error)
    results, by = await scorer.annotate([pair for pair in pairs if isinstance(pair, Pair)])
    given = iter(results)
    done = [
        Annotated(None, pair.reason) if isinstance(pair, DataError) else _judged(pair, next(given)) for pair in pairs
    ]
    return Done(done, by)


def _judged(pair: Pair, found: Annotated) -> Annotated:
    """Equal answers have no margin and no verdict, whatever rounding makes of their scores."""
    if not pair.tie or found.columns is None:
        return found
    even = {name: 0.0 for name in ("margin", "margin_scaled") if found.columns[name] is not None}
    return replace(found, columns=found.columns | even | {"label_agrees": None})


class Progress:
    """The folder of what is done. One process at a time works on it.

    Args:
        identity: of the job; see ``identity``.

    Raises:
        SetupError: another process is at it, or another job was begun for the same output.
    """

    def __init__(self, out: Path, identity: str, *, restart: bool) -> None:
        self.folder = out.with_name(out.name + ".progress")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows = 0
        """That are kept."""
        self._at: dict[int, tuple[int, int]] = {}
        self._flushed_at = -math.inf  # the first chunk is written down at once
        self._lock = os.open(self.folder / "lock", os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise SetupError(f"another inward annotate is at work on {out}") from None
        try:
            self._begin(identity, restart)
            self._file = (self.folder / "done.jsonl").open("a+b")
            self._find()
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._file.closed:
            self._flush()
            self._file.close()
        os.close(self._lock)

    def _begin(self, identity: str, restart: bool) -> None:
        job = self.folder / "job.json"
        begun = json.loads(job.read_text())["identity"] if job.is_file() else None
        if begun is not None and begun != identity:
            if not restart:
                raise SetupError(
                    f"{self.folder} was begun with another input, layout, model or head; --restart throws that away, "
                    "another OUT keeps it"
                )
            begun = None
        if begun is None or restart:
            (self.folder / "done.jsonl").unlink(missing_ok=True)
            write(job, json.dumps({"identity": identity}).encode())

    def _find(self) -> None:
        """Where each chunk's line is; a last line that was cut off is as good as none."""
        self._file.seek(0)
        end = 0
        for line in self._file:
            number, _, content = line.partition(b" ")
            if not line.endswith(b"\n"):
                break
            self._at[int(number)] = (end + len(number) + 1, len(content))
            self.rows += len(Done.decode(content).rows)
            end += len(line)
        self._file.truncate(end)

    def done(self, chunk: Chunk) -> bool:
        """Whether the chunk's rows are kept here."""
        return chunk.number in self._at

    def keep(self, chunk: Chunk, done: Done) -> None:
        """Writes down what became of the chunk; for good after two seconds at the latest, or when this is closed."""
        number, content = b"%d " % chunk.number, done.encode() + b"\n"
        self._at[chunk.number] = (self._file.seek(0, os.SEEK_END) + len(number), len(content))
        self._file.write(number + content)
        self.rows += chunk.rows
        if time.monotonic() - self._flushed_at > FLUSH_INTERVAL_S:
            self._flush()

    def _flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._flushed_at = time.monotonic()

    def read(self, chunk: Chunk) -> Done:
        """What became of the chunk."""
        start, size = self._at[chunk.number]
        self._file.seek(start)
        return Done.decode(self._file.read(size))

    def results(self, chunks: Sequence[Chunk]) -> Iterator[Annotated]:
        """What became of all rows of these chunks, in order."""
        return (row for chunk in chunks for row in self.read(chunk).rows)

    def remove(self) -> None:
        """When everything is put together."""
        self._file.close()
        shutil.rmtree(self.folder)


def identity(
    sources: Sequence[Source], reader: PairReader, asked: Sequence[Any], annotator: Annotator, chunk: int
) -> str:
    """A hash of all that the numbers depend on. The input's content is known by size and time of its files.

    Args:
        asked: further options.
        chunk: rows of one.
    """
    files = [
        [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns]
        for source in sources
        for path in source.paths
    ]
    layout = [reader.layout.name, dict(reader.rename), reader.parse_json]
    return hashlib.sha256(
        json.dumps([files, layout, list(asked), chunk, asdict(annotator)], sort_keys=True).encode()
    ).hexdigest()
