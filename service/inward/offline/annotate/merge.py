"""Rows and what was found out about them, put together: the output file, and a file of the rows that were left out."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from inward.offline.annotate import parquet
from inward.offline.annotate.cells import to_csv, to_json
from inward.offline.annotate.scorer import COLUMNS, Annotated
from inward_client.rows import DataError, Format, Pair, PairReader, Row, Source


@dataclass(frozen=True, slots=True)
class Shape:
    """How a row of the output looks.

    ``prefix`` stands before the names of the new columns. With ``trl`` the pair itself is rewritten as ``prompt``,
    ``chosen`` and ``rejected``, with the whole context in the prompt, and ``margin`` is the bin: what a margin loss
    takes.
    """

    reader: PairReader
    prefix: str = ""
    trl: bool = False

    def names(self) -> tuple[str, ...]:
        """Of the new columns."""
        return tuple(self.prefix + name for name in COLUMNS)

    def added(self, annotated: Annotated) -> Row:
        """The new columns of a row."""
        assert annotated.columns is not None
        columns = dict(annotated.columns)
        if self.trl:
            columns["margin"] = columns["margin_bin"]
        return {self.prefix + name: columns.get(name) for name in COLUMNS}

    def given(self, row: Row) -> Row:
        """The row without the new columns.

        Raises:
            DataError: it holds no pair, and the pair is to be rewritten.
        """
        if not self.trl:
            return row
        rest = {name: value for name, value in row.items() if name not in self.reader.taken}
        return {**_trl(self.reader.pair(row)), **rest}

    def row(self, row: Row, annotated: Annotated) -> Row:
        """The whole row."""
        return {**self.given(row), **self.added(annotated)}


@dataclass(frozen=True, slots=True)
class Table:
    """One table of the output.

    Args:
        schema: of Parquet.
    """

    source: Source
    out: Path
    format: Format
    shape: Shape
    schema: pa.Schema | None = None


def fresh(path: Path) -> Path:
    """What is written first, so that a reader never sees half a file."""
    return path.with_name(f".{path.name}.new")


@contextmanager
def together() -> Iterator[Callable[[Path], Path]]:
    """Files that take their places together in the end, and none of them before; of a path it gives the one to write
    to. What stands at a path to which nothing was written goes away.
    """
    written: list[Path] = []

    def new(path: Path) -> Path:
        written.append(path)
        return fresh(path)

    try:
        yield new
        for path in written:
            if fresh(path).exists():
                fresh(path).replace(path)
            else:
                path.unlink(missing_ok=True)
    finally:
        for path in written:
            fresh(path).unlink(missing_ok=True)


def schema_for(source: Source, shape: Shape) -> pa.Schema:
    """The Parquet schema of a source's output.

    Raises:
        DataError: names what Parquet can't hold.
    """
    names = shape.names()
    if source.columnar and not shape.trl:
        return parquet.schema_of_columns(source, names, shape.prefix)
    return parquet.schema_of_rows(lambda: _readable(source, shape), names, shape.prefix)


def write(table: Table, path: Path, results: Callable[[], Iterable[Annotated]], metadata: Row) -> None:
    """Writes the annotated rows of one source.

    Args:
        path: to write to; the table's own place, or one aside.
        results: gives what became of each row, from the first on; called more than once.
    """
    source, shape = table.source, table.shape

    def rows() -> Iterator[Row]:
        return (shape.row(row, annotated) for row, annotated in good(source, results()))

    path.parent.mkdir(parents=True, exist_ok=True)
    if table.schema is not None and source.columnar and not shape.trl:
        parquet.write_columns(source, results(), shape.added, table.schema, path, metadata)
    elif table.schema is not None:
        parquet.write_rows(rows(), table.schema, path, metadata)
    else:
        names = (column_names(rows()) or _heading(source, shape)) if table.format in ("csv", "tsv") else []
        write_text(path, rows(), table.format, names, packed=table.out.suffix == ".gz")


def write_rejected(sources: Sequence[Source], results: Callable[[Source], Iterable[Annotated]], out: Path) -> None:
    """Writes rows that could not be annotated, each with the reason; no file where there are none."""
    file: IO[str] | None = None
    with ExitStack() as stack:
        for source in sources:
            rows = enumerate(zip(source.numbered(), results(source), strict=True), start=1)
            for number, ((where, row), annotated) in rows:
                if annotated.columns is None:
                    file = file or stack.enter_context(out.open("w", encoding="utf-8"))
                    line: Row = {"source": source.paths[0].name, "row": number, "where": where}
                    line["reason"] = annotated.error
                    file.write(to_json(line | ({} if isinstance(row, DataError) else {"content": row})) + "\n")
    if file is None:
        out.unlink(missing_ok=True)


def good(source: Source, results: Iterable[Annotated]) -> Iterator[tuple[Row, Annotated]]:
    """The rows that were annotated."""
    return ((row, annotated) for _, row, annotated in numbered(source, results))


def numbered(source: Source, results: Iterable[Annotated]) -> Iterator[tuple[int, Row, Annotated]]:
    """The same with their numbers, from 1."""
    for number, (row, annotated) in enumerate(zip(source.rows(), results, strict=True), start=1):
        if annotated.columns is not None and not isinstance(row, DataError):
            yield number, row, annotated


def _heading(source: Source, shape: Shape) -> list[str]:
    """Of a file to which no row is written."""
    return [*column_names(_readable(source, shape)), *shape.names()]


def _readable(source: Source, shape: Shape) -> Iterator[Row]:
    """The rows that hold a pair, as they will be written."""
    for row in source.rows():
        if isinstance(row, dict):
            try:
                shape.reader.pair(row)
                given = shape.given(row)
            except DataError:
                continue
            yield {name: value for name, value in given.items() if name not in shape.names()}


def _trl(pair: Pair) -> Row:
    """Text stays text; a chat prompt has chat answers."""
    if isinstance(pair.prompt, str):
        return pair.body()
    answers = {"chosen": pair.chosen, "rejected": pair.rejected}
    return {"prompt": pair.prompt, **{name: [{"role": "assistant", "content": text}] for name, text in answers.items()}}


def column_names(rows: Iterable[Row]) -> list[str]:
    """Of all rows, in the order in which they come first."""
    return [*dict.fromkeys(name for row in rows for name in row)]


def write_text(path: Path, rows: Iterable[Row], format: Format, names: Sequence[str], *, packed: bool) -> None:
    """Writes rows as CSV with the columns ``names``, or as JSON lines. In UTF-8: half of a surrogate pair, which a CSV
    cell may have, is written as an escape.
    """
    options: Any = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
    with gzip.open(path, "wt", **options) if packed else path.open("w", **options) as file:
        if format not in ("csv", "tsv"):
            file.writelines(to_json(row) + "\n" for row in rows)
            return
        writer = csv.DictWriter(file, names, delimiter="\t" if format == "tsv" else ",")
        writer.writeheader()
        writer.writerows({name: to_csv(value) for name, value in row.items()} for row in rows)
