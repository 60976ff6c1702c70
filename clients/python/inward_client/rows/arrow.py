"""Parquet and Arrow files in pieces; pyarrow is imported when there is one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inward_client.rows.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

AT_ONCE = 1024
"""Rows that are held at once while a file is read."""


@contextmanager
def reading(path: Path, format: str) -> Iterator[None]:
    """Turns what pyarrow and the file system raise into one line.

    Raises:
        DataError: names the file, and what to do.
    """
    try:
        import pyarrow as pa
    except ImportError:
        raise DataError(f"{path} needs pyarrow to be read: pip install pyarrow") from None
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, NotImplementedError) as error:
        if isinstance(error, DataError):
            raise
        said = str(error).split("\n")[0]
        raise DataError(f"{path} can't be read as {format}: {said}; is it whole? Fetch it anew") from None


def schema(paths: Sequence[Path], format: str) -> pa.Schema:
    """Columns and their types.

    Raises:
        DataError: the file is not what its name says, or has a column twice.
    """
    with reading(paths[0], format):
        if format == "parquet":
            from pyarrow import parquet

            found = parquet.read_schema(paths[0])
        else:
            with _arrow(paths[0]) as reader:
                found = reader.schema
    if twice := sorted({name for name in found.names if found.names.count(name) > 1}):
        raise DataError(f"{paths[0]} has the column {twice[0]!r} twice: which of them is meant?")
    return found


def count(paths: Sequence[Path], format: str) -> int:
    """Rows of all files."""
    if format != "parquet":
        return sum(batch.num_rows for batch in batches(paths, format))
    from pyarrow import parquet

    total = 0
    for path in paths:
        with reading(path, format):
            total += int(parquet.read_metadata(path).num_rows)
    return total


def batches(paths: Sequence[Path], format: str) -> Iterator[pa.RecordBatch]:
    """At most ``AT_ONCE`` rows at a time.

    Raises:
        DataError: a file is not what its name says, or is damaged.
    """
    for path in paths:
        with reading(path, format):
            if format == "parquet":
                from pyarrow import parquet

                with parquet.ParquetFile(path) as file:
                    yield from file.iter_batches(batch_size=AT_ONCE)
            else:
                with _arrow(path) as reader:
                    for batch in reader:
                        for start in range(0, batch.num_rows, AT_ONCE):
                            yield batch.slice(start, AT_ONCE)


@contextmanager
def _arrow(path: Path) -> Iterator[Any]:
    import pyarrow as pa

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
