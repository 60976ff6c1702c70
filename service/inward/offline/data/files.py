"""Datasets on disk: JSON lines, CSV, Parquet, and what Hugging Face's ``save_to_disk`` writes (Arrow streams).

Everything is read forwards and in pieces, so that memory does not grow with the file.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

import pyarrow as pa
from pyarrow import parquet

from inward.errors import DataError

Row = dict[str, Any]
Format = Literal["jsonl", "csv", "parquet", "arrow"]
FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip
AT_ONCE = 1024
"""Rows that are held at once while a file is read."""
LONGEST_FIELD = 2**30
"""Characters of one CSV field; Python's own limit (131,072) is shorter than a conversation may be."""


@dataclass(frozen=True, slots=True)
class Source:
    """One table: a file, or the Arrow files of one split that was saved to disk."""

    name: str
    """Of the split or the file, without its ending."""
    paths: tuple[Path, ...]
    format: Format
    limit: int | None = None
    """Rows after which it ends."""

    @property
    def columnar(self) -> bool:
        """Whether its columns have types of their own."""
        return self.format in ("parquet", "arrow")

    def count(self) -> int:
        """Rows; lines without anything in them are none."""
        if self.format == "jsonl":
            with _bytes(self.paths[0]) as lines:
                return sum(1 for _ in islice((line for line in lines if line.strip()), self.limit))
        if self.format == "parquet":
            rows = sum(int(parquet.read_metadata(path).num_rows) for path in self.paths)
            return rows if self.limit is None else min(rows, self.limit)
        return sum(1 for _ in self.rows()) if self.format == "csv" else sum(batch.num_rows for batch in self.batches())

    def schema(self) -> pa.Schema:
        """Columns and their types, of a columnar source."""
        if self.format == "parquet":
            return parquet.read_schema(self.paths[0])
        with _arrow(self.paths[0]) as reader:
            return reader.schema

    def batches(self) -> Iterator[pa.RecordBatch]:
        """A columnar source in pieces.

        Raises:
            DataError: the file is not what its name says.
        """
        left = self.limit
        for batch in self._batches():
            if left is None:
                yield batch
            elif left > 0:
                yield batch.slice(0, left)
                left -= batch.num_rows
            else:
                return

    def _batches(self) -> Iterator[pa.RecordBatch]:
        for path in self.paths:
            try:
                if self.format == "parquet":
                    with parquet.ParquetFile(path) as file:
                        yield from file.iter_batches(batch_size=AT_ONCE)
                else:
                    with _arrow(path) as reader:
                        for batch in reader:
                            for start in range(0, batch.num_rows, AT_ONCE):
                                yield batch.slice(start, AT_ONCE)
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{path} can't be read as {self.format}: {error}") from error

    def rows(self, start: int = 0) -> Iterator[Row | DataError]:
        """The rows from number ``start`` (from 0) on; a line that is none stands there as the error that it is.

        Raises:
            DataError: the file is not what its name says.
        """
        if self.format == "jsonl":
            yield from self._lines(start)
        elif self.format == "csv":
            yield from islice(self._records(), start, self.limit)
        else:
            for batch in self.batches():
                if start < batch.num_rows:
                    yield from batch.slice(start).to_pylist()
                start = max(0, start - batch.num_rows)

    def _lines(self, start: int) -> Iterator[Row | DataError]:
        path = self.paths[0]
        with _bytes(path) as lines:
            filled = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
            for number, line in islice(filled, start, self.limit):
                try:
                    row = json.loads(line)
                except ValueError as error:
                    yield DataError(f"{path.name}, line {number}: not JSON ({error})")
                    continue
                yield (
                    row
                    if isinstance(row, dict)
                    else DataError(f"{path.name}, line {number}: must be a JSON object, a row in braces")
                )

    def _records(self) -> Iterator[Row | DataError]:
        path = self.paths[0]
        csv.field_size_limit(LONGEST_FIELD)
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            try:
                for row in reader:
                    if None in row or None in row.values():
                        yield DataError(
                            f"{path.name}, line {reader.line_num}: has not as many fields as the heading ({len(row) - 1})"
                        )
                    else:
                        yield row
            except (csv.Error, UnicodeDecodeError) as error:
                raise DataError(
                    f"{path}, after line {reader.line_num}: not readable as CSV in UTF-8 ({error})"
                ) from error


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows that are annotated together: ``rows`` of them from ``start`` on."""

    number: int
    source: int
    start: int
    rows: int


class Cursor:
    """Reads chunks; going forwards costs nothing extra, going back starts the file anew."""

    def __init__(self, sources: list[Source]) -> None:
        self._sources = sources
        self._rows: Iterator[Row | DataError] = iter(())
        self._at: tuple[int, int] | None = None

    def read(self, chunk: Chunk) -> list[Row | DataError]:
        """The chunk's rows, in order."""
        source = self._sources[chunk.source]
        if self._at is None or self._at[0] != chunk.source or self._at[1] > chunk.start:
            self._rows, self._at = source.rows(chunk.start), (chunk.source, chunk.start)
        skipped = chunk.start - self._at[1]
        rows = list(islice(self._rows, skipped, skipped + chunk.rows))
        if len(rows) != chunk.rows:
            raise DataError(f"{source.paths[0]} has become shorter while it was read")
        self._at = (chunk.source, chunk.start + chunk.rows)
        return rows


def find(path: Path) -> list[Source]:
    """The tables at ``path``: a file, a folder of files, or a dataset (or a dict of splits) that was saved to disk.

    Raises:
        DataError: there is nothing, or nothing that is known.
    """
    if path.is_file():
        return [_file(path)]
    if not path.is_dir():
        raise DataError(f"{path} does not exist")
    if (path / "dataset_dict.json").is_file():
        return [_saved(path / name, name) for name in json.loads((path / "dataset_dict.json").read_text())["splits"]]
    if (path / "state.json").is_file():
        return [_saved(path, path.name)]
    files = sorted(file for file in path.iterdir() if _ending(file) in FORMATS and not file.name.startswith("."))
    if not files:
        raise DataError(f"{path} has no {', '.join(FORMATS)} files, and is not a dataset that was saved to disk")
    sources = [_file(file) for file in files]
    if len({source.name for source in sources}) < len(sources):
        raise DataError(f"{path} has files whose names differ only in their ending: annotate them one by one")
    return sources


def chunks(counts: list[int], size: int) -> list[Chunk]:
    """All rows of all sources, ``size`` at a time; a chunk never spans two sources."""
    places = [(source, start) for source, count in enumerate(counts) for start in range(0, count, size)]
    return [Chunk(n, source, start, min(size, counts[source] - start)) for n, (source, start) in enumerate(places)]


def format_of(path: Path) -> Format:
    """By the name's ending.

    Raises:
        DataError: an ending that is not known.
    """
    if (ending := _ending(path)) not in FORMATS:
        raise DataError(f"{path}: the name must end with one of {', '.join(FORMATS)} (JSON lines also with .gz)")
    return FORMATS[ending]


def _ending(path: Path) -> str:
    ending = path.suffix.lower()
    return (
        Path(path.stem).suffix.lower()
        if ending == ".gz" and FORMATS.get(Path(path.stem).suffix.lower()) == "jsonl"
        else ending
    )


def _file(path: Path) -> Source:
    source = Source(path.name.split(".")[0] or path.name, (path,), format_of(path))
    if source.format == "jsonl":
        with _bytes(path) as file:
            if file.read(64).lstrip()[:1] == b"[":
                raise DataError(f"{path} is one JSON array; one JSON object a line is needed (jq -c '.[]' makes that)")
    return source


def _saved(folder: Path, name: str) -> Source:
    state = json.loads((folder / "state.json").read_text())
    return Source(name, tuple(folder / file["filename"] for file in state["_data_files"]), "arrow")


@contextmanager
def _bytes(path: Path) -> Iterator[IO[bytes]]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        yield file  # type: ignore[misc]  # GzipFile reads bytes, but is not declared as IO[bytes]


@contextmanager
def _arrow(path: Path) -> Iterator[Any]:
    with ExitStack() as stack:
        file = stack.enter_context(pa.memory_map(str(path)))
        try:
            reader = pa.ipc.open_stream(file)
        except pa.ArrowInvalid:
            reader = pa.ipc.open_file(file)  # Arrow's other format; its batches are numbered
            yield _Numbered(reader)
            return
        yield stack.enter_context(reader)


class _Numbered:
    """An Arrow file's batches, in order."""

    def __init__(self, reader: Any) -> None:
        self.schema, self._reader = reader.schema, reader

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        return (self._reader.get_batch(n) for n in range(self._reader.num_record_batches))
