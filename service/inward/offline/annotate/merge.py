"""Rows and what was found out about them, put together: the output file, a file of the rows that were left out, and
metadata beside it.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pyarrow as pa
from pyarrow import parquet

from inward.errors import DataError
from inward.offline.annotate.asking import COLUMNS, Annotated
from inward.offline.data.files import AT_ONCE, Format, Row, Source
from inward.offline.data.layouts import Layout, Pair, read

METADATA = "inward"
"""Key of the metadata in a Parquet or Arrow schema."""
TYPES = {"label_agrees": pa.bool_()}
"""Types of the columns that are no floats."""
ROWS_A_GROUP = 64 * AT_ONCE
"""Rows of a Parquet row group."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How a row of the output looks.

    ``prefix`` stands before the names of the new columns. With ``trl`` the pair itself is rewritten as ``prompt``,
    ``chosen`` and ``rejected``, and ``margin`` is the bin: what a margin loss takes.
    """

    layout: Layout
    rename: Mapping[str, str]
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
        return {self.prefix + name: columns[name] for name in COLUMNS}

    def row(self, row: Row, annotated: Annotated) -> Row:
        """The whole row."""
        if not self.trl:
            return {**row, **self.added(annotated)}
        taken = {self.rename.get(name, name) for name in self.layout.columns}
        rest = {name: value for name, value in row.items() if name not in taken}
        return {**_trl(read(self.layout, row, self.rename)), **rest, **self.added(annotated)}


Kept = Iterator[tuple[int, Row | DataError, Annotated]]


def write(
    source: Source, results: Callable[[], Iterable[Annotated]], out: Path, format: Format, shape: Shape, metadata: Row
) -> None:
    """Writes the annotated rows of one source; a reader never sees half a file.

    Args:
        results: gives what became of each row, from the first on; called more than once.
    """
    fresh = out.with_name(f".{out.name}.new")
    if format == "parquet":
        _parquet(source, results, fresh, shape, metadata)
    else:
        with _text(fresh, out.suffix == ".gz") as file:
            writer = _csv(file, source, results, shape) if format == "csv" else None
            for row, annotated in good(source, results()):
                if writer is None:
                    file.write(json.dumps(shape.row(row, annotated), ensure_ascii=False, default=str) + "\n")
                else:
                    writer.writerow(shape.row(row, annotated))
    fresh.replace(out)


def write_rejected(sources: Sequence[Source], results: Callable[[Source], Iterable[Annotated]], out: Path) -> int:
    """Writes rows that could not be annotated, each with the reason; no file where there are none. How many there
    are.
    """
    rejected = 0
    with ExitStack() as stack:
        file: IO[str] | None = None
        for source in sources:
            for number, (row, annotated) in enumerate(zip(source.rows(), results(source), strict=True), start=1):
                if annotated.columns is None:
                    file = file or stack.enter_context(out.open("w", encoding="utf-8"))
                    line = {"source": source.paths[0].name, "row": number, "reason": annotated.error}
                    file.write(_json(line | ({} if isinstance(row, DataError) else {"content": row})) + "\n")
                    rejected += 1
    if not rejected:
        out.unlink(missing_ok=True)
    return rejected


def good(source: Source, results: Iterable[Annotated]) -> Iterator[tuple[Row, Annotated]]:
    """The rows that were annotated."""
    for row, annotated in zip(source.rows(), results, strict=True):
        if annotated.columns is not None and not isinstance(row, DataError):
            yield row, annotated


def _parquet(
    source: Source, results: Callable[[], Iterable[Annotated]], out: Path, shape: Shape, metadata: Row
) -> None:
    if source.columnar and not shape.trl:  # keeps every column's type as it is
        schema, tables = _widened(source.schema(), shape), _columns(source, results(), shape)
    else:
        schema = _inferred(shape.row(row, annotated) for row, annotated in good(source, results()))
        tables = (
            _table(rows, schema)
            for rows in _pieces(shape.row(row, annotated) for row, annotated in good(source, results()))
        )
    schema = schema.with_metadata({**(schema.metadata or {}), METADATA: json.dumps(metadata)})
    with parquet.ParquetWriter(out, schema) as writer:
        held: list[pa.Table] = []
        for table in tables:
            held.append(table.replace_schema_metadata(schema.metadata))
            if sum(one.num_rows for one in held) >= ROWS_A_GROUP:
                writer.write_table(pa.concat_tables(held), row_group_size=ROWS_A_GROUP)
                held.clear()
        if held:
            writer.write_table(pa.concat_tables(held), row_group_size=ROWS_A_GROUP)


def _widened(schema: pa.Schema, shape: Shape) -> pa.Schema:
    for name in shape.names():
        if (at := schema.get_field_index(name)) >= 0:
            schema = schema.remove(at)
        schema = schema.append(pa.field(name, TYPES.get(name.removeprefix(shape.prefix), pa.float64())))
    # Hugging Face's description of the columns would not know the new ones; it is made anew from the types.
    return schema.with_metadata({key: value for key, value in (schema.metadata or {}).items() if key != b"huggingface"})


def _columns(source: Source, results: Iterable[Annotated], shape: Shape) -> Iterator[pa.Table]:
    schema, given = _widened(source.schema(), shape), iter(results)
    for batch in source.batches():
        annotated = [next(given) for _ in range(batch.num_rows)]
        kept = [shape.added(one) for one in annotated if one.columns is not None]
        table = pa.Table.from_batches([batch]).filter(pa.array([one.columns is not None for one in annotated]))
        arrays = [
            pa.array([row[field.name] for row in kept], field.type)
            if field.name in shape.names()
            else table.column(field.name)
            for field in schema
        ]
        yield pa.Table.from_arrays(arrays, schema=schema)


def _inferred(rows: Iterable[Row]) -> pa.Schema:
    schema = pa.schema([])
    for piece in _pieces(rows):
        try:
            schema = pa.unify_schemas(
                [schema, pa.Table.from_pylist(_all_keys(piece)).schema], promote_options="permissive"
            )
        except pa.ArrowException as error:
            raise DataError(
                f"a column has values of several types, which Parquet can't hold; write JSON lines instead ({error})"
            ) from None
    return pa.schema([pa.field(f.name, pa.string()) if pa.types.is_null(f.type) else f for f in schema])


def _table(rows: list[Row], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=schema)


def _all_keys(rows: list[Row]) -> list[Row]:
    """Arrow takes the columns of the first row for those of all."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in names} for row in rows]


def _pieces(rows: Iterable[Row]) -> Iterator[list[Row]]:
    piece: list[Row] = []
    for row in rows:
        piece.append(row)
        if len(piece) == AT_ONCE:
            yield piece
            piece = []
    if piece:
        yield piece


def _csv(
    file: IO[str], source: Source, results: Callable[[], Iterable[Annotated]], shape: Shape
) -> csv.DictWriter[str]:
    names = dict.fromkeys(name for row, annotated in good(source, results()) for name in shape.row(row, annotated))
    writer = csv.DictWriter(file, [*names])
    writer.writeheader()
    return writer


def _trl(pair: Pair) -> Row:
    """Text stays text; a chat prompt has chat answers."""
    if isinstance(pair.prompt, str):
        return pair.body()
    answers = {"chosen": pair.chosen, "rejected": pair.rejected}
    return {"prompt": pair.prompt, **{name: [{"role": "assistant", "content": text}] for name, text in answers.items()}}


def _json(value: Row) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, default=str)
    return text


@contextmanager
def _text(path: Path, compressed: bool) -> Iterator[IO[str]]:
    if compressed:
        with gzip.open(path, "wt", encoding="utf-8", newline="") as file:
            yield file
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            yield file
