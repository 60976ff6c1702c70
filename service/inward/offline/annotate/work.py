"""Chunks to be done, and what is done: kept beside the output as it comes, so that a job which was stopped goes on
where it was.

    <out>.progress/job.json         what this job is: another input, model or head is another job
    <out>.progress/000012.jsonl     one line for each row of chunk 12, in order; written at once, or not at all

A chunk's file holds only what is added to its rows: it is small, and the rows are read again when everything is put
together.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from inward.errors import DataError, SetupError
from inward.files import write
from inward.offline.annotate.asking import Annotated, Annotator, MarginClient
from inward.offline.data.files import Chunk, Row, Source
from inward.offline.data.layouts import Layout, Pair, read

CHUNK = 256
"""Rows of a chunk: enough to pack well, few enough that little is lost with one."""


@dataclass(frozen=True, slots=True)
class Task:
    """What is to be done to every row."""

    layout: Layout
    rename: Mapping[str, str]
    truncate: bool
    head: str | None

    async def do(self, asker: MarginClient, rows: Sequence[Row | DataError]) -> Done:
        """Annotates the rows of a chunk; one that can't be is an error in its place."""
        pairs: list[Pair | DataError] = []
        for row in rows:
            try:
                pairs.append(row if isinstance(row, DataError) else read(self.layout, row, self.rename))
            except DataError as error:
                pairs.append(error)
        results, by = await asker.annotate([pair for pair in pairs if isinstance(pair, Pair)])
        given = iter(results)
        return Done([next(given) if isinstance(pair, Pair) else Annotated(None, pair.message) for pair in pairs], by)


@dataclass(frozen=True, slots=True)
class Done:
    """What became of a chunk's rows, and which version of head and policy said so."""

    rows: list[Annotated]
    by: dict[str, Any] | None

    def encode(self) -> bytes:
        """One line for what annotated, and one for each row."""
        lines = [json.dumps(self.by), *(json.dumps([row.columns, row.error, row.truncated]) for row in self.rows)]
        return ("\n".join(lines) + "\n").encode()

    @classmethod
    def decode(cls, content: bytes) -> Done:
        """The inverse."""
        by, *rows = (json.loads(line) for line in content.splitlines())
        return cls([Annotated(*row) for row in rows], by)


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
        self._lock = os.open(self.folder / "lock", os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise SetupError(f"another inward annotate is at work on {out}") from None
        try:
            self._begin(identity, restart)
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)

    def _begin(self, identity: str, restart: bool) -> None:
        job = self.folder / "job.json"
        begun = json.loads(job.read_text())["identity"] if job.is_file() else None
        if begun is not None and begun != identity:
            if not restart:
                raise SetupError(
                    f"{self.folder} was begun with another input, layout, model or head; --restart throws that away, another OUT keeps it"
                )
            begun = None
        if begun is None or restart:
            for part in self.folder.glob("*.jsonl"):
                part.unlink()
            write(job, json.dumps({"identity": identity}).encode())

    def done(self, chunk: Chunk) -> bool:
        """Whether the chunk's rows are kept here."""
        return self._part(chunk).is_file()

    def keep(self, chunk: Chunk, done: Done) -> None:
        """Writes down what became of the chunk, for good."""
        write(self._part(chunk), done.encode())

    def read(self, chunk: Chunk) -> Done:
        """What became of the chunk."""
        return Done.decode(self._part(chunk).read_bytes())

    def results(self, chunks: Sequence[Chunk]) -> Iterator[Annotated]:
        """What became of all rows of these chunks, in order."""
        return (row for chunk in chunks for row in self.read(chunk).rows)

    def remove(self) -> None:
        """When everything is put together."""
        shutil.rmtree(self.folder)

    def _part(self, chunk: Chunk) -> Path:
        return self.folder / f"{chunk.number:06}.jsonl"


def identity(sources: Sequence[Source], task: Task, annotator: Annotator, chunk: int, limit: int | None) -> str:
    """A hash of all that the numbers depend on. The input's content is known by size and time of its files."""
    files = [
        [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns]
        for source in sources
        for path in source.paths
    ]
    asked = [task.layout.name, dict(task.rename), task.truncate, task.head, chunk, limit]
    return hashlib.sha256(json.dumps([files, asked, asdict(annotator)], sort_keys=True).encode()).hexdigest()
