"""Annotated rows as Parquet. What Parquet can't hold is found before anything is scored."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from inward.offline.annotate.scorer import Annotated
from inward_client.rows import DataError, Row, Source
from inward_client.rows.arrow import AT_ONCE

METADATA = "inward"
"""Key of the metadata in a Parquet schema."""
TYPES = {"label_agrees": pa.bool_()}
"""Types of the new columns that are no floats."""
ROWS_A_GROUP = 64 * AT_ONCE
"""Rows of a Parquet row group."""
LACKING = (pa.ArrowException, NotImplementedError, OverflowError, UnicodeError, TypeError, ValueError)
"""What pyarrow raises for a value or a type that it can't write."""
INSTEAD = "write JSON lines instead (OUT.jsonl)"

Added = Callable[[Annotated], Row]
"""The new columns of an annotated row."""


def schema_of_rows(rows: Callable[[], Iterable[Row]], names: Sequence[str], prefix: str) -> pa.Schema:
    """The schema of rows that have no types of their own, with the new columns; every row was tried.

    Args:
        rows: as they will be written, but for the new columns; called twice.

    Raises:
        DataError: names the column, and the row where it is one, that Parquet can't hold.
    """
    schema = pa.schema([])
    for start, piece in _pieces(rows()):
        found = _table(piece, None, start).schema
        try:
            schema = pa.unify_schemas([schema, found], promote_options="permissive")
        except pa.ArrowException:
            column = next(name for name in found.names if not _agree(schema, found, name))
            raise DataError(
                f"{column!r} holds values of several types, which Parquet can't: {INSTEAD}", column=column
            ) from None
    schema = pa.schema([pa.field(f.name, pa.string()) if pa.types.is_null(f.type) else f for f in schema])
    _check_writable(schema)
    for start, piece in _pieces(rows()):
        _table(piece, schema, start)
    return widened(schema, names, prefix)


def schema_of_columns(source: Source, names: Sequence[str], prefix: str) -> pa.Schema:
    """The schema of a columnar source, types as they are, with the new columns.

    Raises:
        DataError: names the column that can't be written.
    """
    schema = widened(source.schema(), names, prefix)
    _check_writable(schema)
    return schema


def widened(schema: pa.Schema, names: Sequence[str], prefix: str) -> pa.Schema:
    """With the new columns at its end, in the place of those that have their names."""
    for name in names:
        if (at := schema.get_field_index(name)) >= 0:
            schema = schema.remove(at)
        schema = schema.append(pa.field(name, TYPES.get(name.removeprefix(prefix), pa.float64())))
    # Hugging Face's description of the columns would not know the new ones; it is made anew from the types.
    return schema.with_metadata({key: value for key, value in (schema.metadata or {}).items() if key != b"huggingface"})


def write_rows(rows: Iterable[Row], schema: pa.Schema, out: Path, metadata: Row) -> None:
    """Writes rows that are complete."""
    _write((_table(piece, schema, start) for start, piece in _pieces(rows)), schema, out, metadata)


def write_columns(
    source: Source, results: Iterable[Annotated], added: Added, schema: pa.Schema, out: Path, metadata: Row
) -> None:
    """Writes a columnar source's annotated rows; its columns pass as they are, whatever their types."""
    _write(_columns(source, iter(results), added, schema), schema, out, metadata)


def _columns(source: Source, results: Iterator[Annotated], added: Added, schema: pa.Schema) -> Iterator[pa.Table]:
    given = set(source.schema().names)
    for batch in source.batches():
        annotated = [next(results) for _ in range(batch.num_rows)]
        new = [added(one) for one in annotated if one.columns is not None]
        kept = _slices(batch, [one.columns is not None for one in annotated])
        fresh = set(new[0]) if new else set(schema.names) - given
        arrays = [
            pa.array([row[field.name] for row in new], field.type)
            if field.name in fresh or field.name not in given
            else kept.column(field.name)
            for field in schema
        ]
        if new:
            yield pa.Table.from_arrays(arrays, schema=schema)


def _slices(batch: pa.RecordBatch, kept: Sequence[bool]) -> pa.Table:
    """The rows that are kept. Slices, because not every type has a kernel that filters it."""
    runs: list[pa.RecordBatch] = []
    start = 0
    for i in chain((i for i, keep in enumerate(kept) if not keep), (len(kept),)):
        if i > start:
            runs.append(batch.slice(start, i - start))
        start = i + 1
    return pa.Table.from_batches(runs, schema=batch.schema)


def _write(tables: Iterable[pa.Table], schema: pa.Schema, out: Path, metadata: Row) -> None:
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


def _table(rows: Sequence[Row], schema: pa.Schema | None, start: int) -> pa.Table:
    """Arrow takes the columns of the first row for those of all, so each row gets all of them."""
    names = schema.names if schema else list(dict.fromkeys(name for row in rows for name in row))
    try:
        return pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows], schema=schema)
    except LACKING:
        for name in names:
            _blame(name, [row.get(name) for row in rows], schema.field(name).type if schema else None, start)
        raise


def _blame(column: str, values: Sequence[Any], type: Any, start: int) -> None:
    """Raises what is wrong with the first value of a column that Arrow can't take."""
    try:
        pa.array(values, type)
        return
    except LACKING as error:
        said = error
    least, most = 0, len(values)  # the values before ``least`` are taken together, those before ``most`` are not
    while most - least > 1:
        middle = (least + most) // 2
        try:
            pa.array(values[:middle], type)
            least = middle
        except LACKING as error:
            most, said = middle, error
    if isinstance(said, OverflowError) or "too large" in str(said) or "out of range" in str(said):
        why = "an integer that does not fit into the column's 64 bits"
    elif "exactly representable" in str(said):
        why = "an integer that a column of fractions can't hold exactly"
    elif isinstance(said, UnicodeError):
        why = "text that is not Unicode (half of a surrogate pair)"
    else:
        why = f"a value of another type than the rows before it ({str(said).splitlines()[0]})"
    raise DataError(
        f"{column!r} of row {start + most} holds {why}, which Parquet can't hold: {INSTEAD}", column=column
    ) from None


def _check_writable(schema: pa.Schema) -> None:
    for field in schema:
        try:
            with parquet.ParquetWriter(io.BytesIO(), pa.schema([field])):
                pass
        except LACKING:
            empty = "empty objects ({})" if "struct<>" in str(field.type) else f"the type {field.type}"
            raise DataError(
                f"{field.name!r} holds {empty}, which Parquet can't: {INSTEAD}", column=field.name
            ) from None


def _agree(schema: pa.Schema, other: pa.Schema, name: str) -> bool:
    if schema.get_field_index(name) < 0:
        return True
    try:
        pa.unify_schemas(
            [pa.schema([schema.field(name)]), pa.schema([other.field(name)])], promote_options="permissive"
        )
    except pa.ArrowException:
        return False
    return True


def _pieces(rows: Iterable[Row]) -> Iterator[tuple[int, list[Row]]]:
    """Rows together, and how many stood before them."""
    start, left = 0, iter(rows)
    while piece := list(islice(left, AT_ONCE)):
        yield start, piece
        start += len(piece)
