"""Files of text → rows: JSON lines, one JSON array, CSV; plain or packed with gzip, whatever their names say.

Everything is read forwards and in pieces. A row that can't be read stands in its place as the ``DataError`` that it is;
a file that can't be read any further is raised, with the line and what to do.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from inward_client.rows.errors import DataError

Numbered = Iterator[tuple[str, dict[str, Any] | DataError]]
"""Where a row stands, and the row."""
GZIP = b"\x1f\x8b"
GZIP_HEADER = 31
"""zlib's number for data with gzip's header."""
OTHERS = {
    b"PAR1": "is a Parquet file: name it .parquet",
    b"ARROW1": "is an Arrow file: name it .arrow",
    b"PK\x03\x04": "is a zip archive: unpack it",
    b"\x28\xb5\x2f\xfd": "is packed with zstd: unpack it (zstd -d)",
    b"BZh": "is packed with bzip2: unpack it (bzip2 -d)",
    b"\xfd7zXZ": "is packed with xz: unpack it (xz -d)",
}
"""First bytes of files that are something else than their names say."""
LATIN = "iconv -f LATIN1 -t UTF-8 may be what it needs"
PIECE = 2**16
"""Bytes of a JSON array that are read at once."""
LONGEST_ELEMENT = 2**28
"""Characters of one element of a JSON array."""
LONGEST_FIELD = 2**30
"""Characters of one CSV field; Python's own limit (131,072) is shorter than a conversation may be."""


@contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader[Any]]:
    """The file's bytes, unpacked where they are packed with gzip.

    Raises:
        DataError: it is something else than text.
    """
    with path.open("rb") as file:
        head = file.read(8)
        file.seek(0)
        for magic, said in OTHERS.items():
            if head.startswith(magic):
                raise DataError(f"{path} {said}")
        if head.startswith(GZIP):
            unpacked = io.BufferedReader(_Unpacked(file), PIECE)
            _check_encoding(path, unpacked.peek(4))
            yield unpacked
            return
        if path.suffix == ".gz" and head:
            raise DataError(f"{path} is not packed with gzip: name it without .gz")
        _check_encoding(path, head)
        yield file


class _Unpacked(io.RawIOBase):
    """What is packed with gzip. Unlike the standard library's reader it gives all that can be unpacked of a file that
    ends too early, and raises ``EOFError`` after that.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._unpack, self._packed = file, zlib.decompressobj(GZIP_HEADER), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            packed, self._packed = self._packed or self._file.read(PIECE), b""
            if self._unpack.eof:
                packed = packed.lstrip(b"\0")  # padding behind the last part
                if not packed:
                    return 0
                self._unpack = zlib.decompressobj(GZIP_HEADER)
            data = self._unpack.decompress(packed, len(buffer))
            self._packed = self._unpack.unused_data or self._unpack.unconsumed_tail
            if data:
                buffer[: len(data)] = data
                return len(data)
            if not packed and not self._unpack.eof:
                raise EOFError


class Location:
    """How far a file was read, for the error that may come."""

    def __init__(self, path: Path, unit: str = "line") -> None:
        self.path, self.unit = path, unit
        self.number = 0

    def __str__(self) -> str:
        return f"{self.path.name}, {self.unit} {self.number}"

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turns what the file system and the unpacking raise into one line.

        Raises:
            DataError: names the file, the last line that was read, and what to do.
        """
        try:
            yield
        except (EOFError, zlib.error) as error:
            what = "ends too early" if isinstance(error, EOFError) else "is damaged"
            raise DataError(
                f"can't be read to its end: the gzip data {what}. Fetch it anew; {self._whole()}", where=self._next()
            ) from None
        except UnicodeDecodeError as error:
            raise DataError(
                f"is not UTF-8 (byte {error.object[error.start]:#04x}); {LATIN}", where=self._next()
            ) from None
        except OSError as error:
            raise DataError(
                f"can't be read: {error.strerror or type(error).__name__}; {self._whole()}", where=self._next()
            ) from None

    def _next(self) -> str:
        return f"{self.path}, in {self.unit} {self.number + 1}"

    def _whole(self) -> str:
        return f"what stands up to {self.unit} {self.number} is whole" if self.number else "nothing of it was read"


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines with something in them, and their numbers from 1."""
    location = Location(path)
    with location.reading(), opened(path) as file:
        for number, line in enumerate(file, start=1):
            location.number = number
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield number, line


def is_array(path: Path) -> bool:
    """Whether the file is one JSON array instead of JSON lines."""
    with Location(path).reading(), opened(path) as file:
        return file.peek(PIECE).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def json_line(path: Path, number: int, line: bytes) -> tuple[str, dict[str, Any] | DataError]:
    """The row in a line."""
    where = f"{path.name}, line {number}"
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        return where, DataError(f"not UTF-8 (byte {error.object[error.start]:#04x}); {LATIN}", where=where)
    except RecursionError:
        return where, DataError("nested too deeply", where=where)
    except ValueError as error:
        return where, DataError(f"not JSON ({error})", where=where)
    return where, row if isinstance(row, dict) else DataError("must be a JSON object, a row in braces", where=where)


def array(path: Path) -> Numbered:
    """The elements of one JSON array.

    Raises:
        DataError: it is not JSON from some element on.
    """
    location = Location(path, "element")
    with location.reading(), opened(path) as file:
        for value in _elements(file, location):
            where = str(location)
            yield where, value if isinstance(value, dict) else DataError("must be a JSON object", where=where)


def records(path: Path, delimiter: str) -> Numbered:
    """The records of a CSV file, by its heading.

    Raises:
        DataError: the heading has a name twice, or the rest can't be read.
    """
    location = Location(path)
    csv.field_size_limit(LONGEST_FIELD)
    with location.reading(), opened(path) as packed:
        file = io.TextIOWrapper(packed, encoding="utf-8-sig", newline="")
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            _check_heading(path, list(reader.fieldnames or ()), delimiter)
            location.number = 1
            for row in reader:
                location.number = reader.line_num
                where = str(location)
                fits = None not in row and None not in row.values()
                yield where, row if fits else DataError("has not as many fields as the heading", where=where)
        except csv.Error as error:
            raise DataError(
                f"not readable as CSV ({error}): is a quotation mark missing?",
                where=f"{path}, in line {location.number + 1}",
            ) from None
        except UnicodeDecodeError as error:
            location.number = _lines_before(path, error)
            raise


def _elements(file: IO[bytes], location: Location) -> Iterator[Any]:
    decode, parse = codecs.getincrementaldecoder("utf-8-sig")(), json.JSONDecoder().raw_decode
    held, at, piece, ended = "", 0, PIECE, False

    def more() -> None:
        nonlocal held, at, piece, ended
        data = file.read(piece)
        held, at, ended = held[at:] + decode.decode(data, final=not data), 0, not data
        if len(held) > LONGEST_ELEMENT:
            raise DataError(f"is longer than {LONGEST_ELEMENT:,} characters", where=str(location))

    def next_sign() -> str:
        """The next character that is no white space, which is passed over; empty at the end."""
        nonlocal at
        while True:
            while at < len(held) and held[at] in " \t\r\n":
                at += 1
            if at < len(held) or ended:
                return held[at : at + 1]
            more()

    next_sign()
    at += 1  # the bracket that was seen by ``is_array``
    ended_at_once = next_sign() == "]"
    while not ended_at_once:
        location.number += 1
        next_sign()
        while True:
            try:
                value, end = parse(held, at)
                if end < len(held) or ended:
                    break
            except json.JSONDecodeError as error:
                if ended:
                    raise DataError(f"not JSON ({error.msg})", where=str(location)) from None
            except RecursionError:
                raise DataError("nested too deeply", where=str(location)) from None
            piece *= 2
            more()
        at, piece = end, PIECE
        yield value
        if (sign := next_sign()) == "]":
            break
        if sign != ",":
            raise DataError("is not followed by a comma, or by the array's end", where=str(location))
        at += 1
    at += 1
    if next_sign():
        raise DataError("the array ends here, and more follows", where=str(location))


def _check_heading(path: Path, names: list[str], delimiter: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"the heading has {twice[0]!r} twice: which of them is meant?", where=f"{path}, line 1")
    other = next((sign for sign in ";\t," if sign != delimiter and len(names) == 1 and sign in names[0]), None)
    if other:
        raise DataError(
            f"the heading is the one name {names[0]!r}: fields must be separated by {delimiter!r}, not by {other!r} "
            "(tabs: name it .tsv)",
            where=f"{path}, line 1",
        )


def _lines_before(path: Path, error: UnicodeDecodeError) -> int:
    """Lines before the first one that is not UTF-8: text is decoded in pieces, which may be many lines ahead."""
    with opened(path) as file:
        for number, line in enumerate(file):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    raise error


def _check_encoding(path: Path, head: bytes) -> None:
    even, odd = head[0:4:2], head[1:4:2]
    zeros = b"\0\0" in (even, odd) and even != odd
    wide = b"\0\0" in (head[0:2], head[2:4])  # four bytes a character
    if zeros or wide or head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        name = "UTF-32" if wide else "UTF-16"
        raise DataError(f"{path} is not UTF-8 but {name}: iconv -f {name} -t UTF-8 makes it that")
