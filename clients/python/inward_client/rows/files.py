"""From a path to rows: JSON lines, a JSON array, CSV, Parquet, what Hugging Face's ``save_to_disk`` writes, folders of
such files and snapshots of a hub; each plain or packed with gzip where it is text.

Everything is read forwards and in pieces, so that memory does not grow with the file.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from inward_client.rows import arrow, text
from inward_client.rows.errors import DataError
from inward_client.rows.pair import Pair
from inward_client.rows.pair_layouts import ADVICE, AUTO, LOOKED_AT, recognise
from inward_client.rows.terminal import printable

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")
Row = dict[str, Any]
Format = Literal["jsonl", "array", "csv", "tsv", "parquet", "arrow"]
FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
    ".arrow": "arrow",
}  # fmt: skip
PACKED = frozenset({"jsonl", "csv", "tsv"})
"""Formats that may have ``.gz`` behind their ending."""
DELIMITERS = {"csv": ",", "tsv": "\t"}
ABOUT = (
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    ".annotation.json",
    ".rejected.jsonl",
)
"""Endings of files that lie beside tables and are none."""
MOST_REASONS = 3


@dataclass(frozen=True, slots=True)
class Source:
    """One table: a file, or the Arrow files of one split that was saved to disk."""

    name: str
    """Of the split, or the file's path in the folder that was given; without its ending."""
    paths: tuple[Path, ...]
    format: Format
    limit: int | None = None
    """Rows after which it ends."""

    @property
    def columnar(self) -> bool:
        """Whether its columns have types of their own."""
        return self.format in ("parquet", "arrow")

    def count(self) -> int:
        """Rows; lines without anything in them are none. All of a file of text is read for it.

        Raises:
            DataError: the file can't be read to its end.
        """
        if self.format == "jsonl":
            return sum(1 for _ in islice(text.lines(self.paths[0]), self.limit))
        if self.columnar:
            rows = arrow.count(self.paths, self.format)
            return rows if self.limit is None else min(rows, self.limit)
        return sum(1 for _ in self.rows())

    def schema(self) -> pa.Schema:
        """Columns and their types, of a columnar source.

        Raises:
            DataError: the file is not what its name says, or has a column twice.
        """
        return arrow.schema(self.paths, self.format)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """A columnar source in pieces.

        Raises:
            DataError: the file is not what its name says, or is damaged.
        """
        left = self.limit
        for batch in arrow.batches(self.paths, self.format):
            if left is None:
                yield batch
            elif left > 0:
                yield batch.slice(0, left)
                left -= batch.num_rows
            else:
                return

    def rows(self, start: int = 0) -> Iterator[Row | DataError]:
        """The rows from number ``start`` (from 0) on; one that can't be read stands there as the error that it is.

        Raises:
            DataError: the file can't be read any further; names the line, and what to do.
        """
        return (row for _, row in self.numbered(start))

    def numbered(self, start: int = 0) -> text.Numbered:
        """``rows``, and where each stands, such as ``pairs.jsonl, line 3``."""
        path = self.paths[0]
        if self.format == "jsonl":
            for number, line in islice(text.lines(path), start, self.limit):
                yield text.json_line(path, number, line)
        elif self.columnar:
            self.schema()
            yield from self._columnar(start)
        else:
            rows = text.array(path) if self.format == "array" else text.records(path, DELIMITERS[self.format])
            yield from islice(rows, start, self.limit)

    def _columnar(self, start: int) -> text.Numbered:
        number = 0
        for batch in self.batches():
            skipped = min(batch.num_rows, max(0, start - number))
            with arrow.reading(self.paths[0], self.format):
                rows = batch.slice(skipped).to_pylist() if skipped < batch.num_rows else []
            for i, row in enumerate(rows, start=number + skipped + 1):
                yield f"{self.paths[0].name}, row {i}", row
            number += batch.num_rows


@dataclass(frozen=True)
class Collected(Generic[T]):
    """All rows of a file that can be read, and what became of the others."""

    values: list[T]
    numbers: list[int]
    """The row of each value, from 0."""
    left_out: list[DataError]
    notes: list[str]
    """What else a reader should be told."""

    def warnings(self) -> list[str]:
        """The notes, and how many rows were left out and why."""
        if not self.left_out:
            return self.notes
        reasons = Counter(error.reason for error in self.left_out)
        first = {error.reason: error.where for error in reversed(self.left_out)}
        told = [f"{n:,} × {reason} (first: {first[reason]})" for reason, n in reasons.most_common(MOST_REASONS)]
        rows = len(self.values) + len(self.left_out)
        return [*self.notes, printable(f"{len(self.left_out):,} of {rows:,} rows are left out: {'; '.join(told)}")]


def collect(path: Path, read: Callable[[Row], T], limit: int | None = None) -> Collected[T]:
    """Reads all rows of a file or folder, the first ``limit`` of each table.

    Raises:
        DataError: there are none, or none of them can be read (the first one's error).
    """
    found = Collected[T]([], [], [], [])
    number = -1
    for number, (where, row) in enumerate(_all(path, limit)):
        try:
            if isinstance(row, DataError):
                raise row
            found.values.append(read(row))
            found.numbers.append(number)
        except DataError as error:
            found.left_out.append(error.at(where))
    if number < 0:
        raise DataError(f"{path} has no rows")
    if not found.values:
        raise found.left_out[0]
    return found


def collect_pairs(
    path: Path,
    *,
    layout: str = AUTO,
    columns: Mapping[str, str] | None = None,
    parse_json: bool = False,
    limit: int | None = None,
    advice: str = ADVICE,
) -> Collected[Pair]:
    """Reads the pairs of a file or folder, in whatever layout it has.

    Args:
        columns, advice: see ``recognise``.

    Raises:
        DataError: no layout fits, there are no rows, or none of them can be read.
    """
    firsts = [row for _, row in islice(_all(path, limit), LOOKED_AT) if isinstance(row, dict)]
    if not firsts:  # nothing to recognise: say what is wrong with the rows
        collect(path, dict, limit)
    reader = recognise(firsts, columns, name=layout, parse_json=parse_json, advice=advice)
    found = collect(path, reader.pair, limit)
    found.notes.extend(reader.notes(firsts))
    return found


def find(path: Path) -> list[Source]:
    """The tables at ``path``: a file, a folder of files (also in its folders, as a hub's snapshot has them), or a
    dataset (or a dict of splits) that was saved to disk.

    Raises:
        DataError: there is nothing, or nothing that is known.
    """
    path = Path(path)
    if path.is_file():
        return [_file(path, _stem(path.name))]
    if not path.is_dir():
        raise DataError(f"{path} does not exist")
    if (path / "dataset_dict.json").is_file():
        return [_saved(path / name, name) for name in _told(path / "dataset_dict.json", "splits")]
    if (path / "state.json").is_file():
        return [_saved(path, path.name)]
    folder = _snapshot(path)
    files = sorted(file for file in folder.rglob("*") if _is_table(file, folder))
    if not files:
        raise DataError(
            f"{path} and its folders have no {', '.join(FORMATS)} files, and it is not a dataset that was saved to disk"
        )
    sources = [_file(file, _stem(file.relative_to(folder).as_posix())) for file in files]
    if len({source.name for source in sources}) < len(sources):
        raise DataError(f"{path} has files whose names differ only in their ending: read them one by one")
    return sources


def format_of(path: Path) -> Format:
    """By the name's ending.

    Raises:
        DataError: an ending that is not known.
    """
    if (ending := _ending(path.name)) not in FORMATS:
        raise DataError(f"{path}: the name must end with one of {', '.join(FORMATS)} (text also with .gz)")
    return FORMATS[ending]


def _all(path: Path, limit: int | None) -> text.Numbered:
    for source in find(path):
        yield from islice(source.numbered(), limit)


def _ending(name: str) -> str:
    stem, _, last = name.lower().rpartition(".")
    if last == "gz" and FORMATS.get(f".{stem.rpartition('.')[2]}") in PACKED:
        return f".{stem.rpartition('.')[2]}"
    return f".{last}"


def _stem(name: str) -> str:
    """Without the format's ending, whatever other dots there are."""
    plain = name[:-3] if name.lower().endswith(".gz") else name
    return plain.rpartition(".")[0] or name


def _is_table(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not hidden and _ending(file.name) in FORMATS and not file.name.endswith(ABOUT) and file.is_file()


def _snapshot(path: Path) -> Path:
    """The folder itself, or of a hub's cache folder its newest snapshot."""
    snapshots = path / "snapshots"
    if not snapshots.is_dir():
        return path
    main = path / "refs" / "main"
    if main.is_file() and (named := snapshots / main.read_text().strip()).is_dir():
        return named
    return max((folder for folder in snapshots.iterdir()), key=lambda folder: folder.stat().st_mtime, default=path)


def _file(path: Path, name: str) -> Source:
    format = format_of(path)
    if format == "jsonl" and text.is_array(path):
        format = "array"
    return Source(name, (path,), format)


def _saved(folder: Path, name: str) -> Source:
    files = _told(folder / "state.json", "_data_files")
    return Source(name, tuple(folder / file["filename"] for file in files), "arrow")


def _told(path: Path, field: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))[field]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not what save_to_disk writes ({type(error).__name__}): save it anew") from None
