"""What a GGUF file says of itself, read without trusting a byte of it.

The format: magic, version, counts; then keys with typed values (settings, vocabulary, chat template); then one entry
for each tensor (name, dimensions, type, offset); then the tensors, aligned
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Every length is compared with the size of the file before
anything is read or allocated by it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from inward.errors import SetupError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 256 * 2**20
"""Of keys and tensor entries; a vocabulary of a quarter of a million tokens takes about 10 MiB."""
MAX_NAME_BYTES = 1024
MAX_DIMENSIONS = 4
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_NO_WEIGHTS = {"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K", "Q1_0"}
"""Types that no model's weights come in; the `gguf` package can't dequantise them."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: its dimensions (fastest first, as GGUF writes them), its type, and where its bytes are."""

    name: str
    shape: tuple[int, ...]
    type: str
    start: int
    size: int

    @property
    def values(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """The keys and the table of tensors of ``path``."""

    path: Path
    keys: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]

    @property
    def architecture(self) -> str:
        return str(self.get("general.architecture", str))

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of ``key``, or ``default`` where there is none.

        Raises:
            SetupError: it is of another type than ``kind``.
        """
        value = self.keys.get(key, default)
        if value is not default and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise SetupError(f"{self.path}: {key} is {_shown(value)}, which is not of type {kind.__name__}")
        return value

    def setting(self, name: str, kind: type, default: Any = None) -> Any:
        """The value of an architecture's own key, such as ``block_count`` of ``llama.block_count``."""
        return self.get(f"{self.architecture}.{name}", kind, default)


def read_header(path: Path) -> Header:
    """Reads and checks the head of a GGUF file: format, lengths, names, types of tensors, and that all are there.

    Raises:
        SetupError: it is not such a file, is cut off, or says what can't be.
    """
    try:
        with path.open("rb") as stream:
            return _Reader(path, stream, os.fstat(stream.fileno()).st_size).header()
    except OSError as error:
        raise SetupError(f"{path} cannot be read: {error.strerror}") from error


class _Reader:
    """A position in the file, and what may be read from there."""

    def __init__(self, path: Path, stream: BinaryIO, size: int) -> None:
        self._path, self._stream, self._size = path, stream, size
        self._at = 0

    def header(self) -> Header:
        magic = self._stream.read(4)
        self._at = 4
        if magic != MAGIC:
            raise self._error(f"not a GGUF file: it begins with {magic!r}, not {MAGIC!r}")
        version = self._number("I")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            known = f"versions {' and '.join(map(str, VERSIONS))} can be read"
            raise self._error(
                f"big-endian, which cannot be read: {known}"
                if swapped in VERSIONS
                else f"GGUF version {version}: {known}"
            )
        tensors, keys = self._number("Q"), self._number("Q")
        self._room(tensors * 24 + keys * 12, f"{tensors} tensors and {keys} keys")  # the least that they take
        values = self._keys(keys)
        if (parts := values.get("split.count", 1)) != 1:
            raise self._error(f"one of {_shown(parts)} parts: put them together with llama-gguf-split --merge")
        entries = [self._entry() for _ in range(tensors)]
        return Header(self._path, values, self._placed(entries, self._alignment(values)))

    def _keys(self, count: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for _ in range(count):
            key = self._name("a key")
            if key in values:
                raise self._error(f"the key {key!r} is there twice")
            values[key] = self._value(self._number("I"), key)
        return values

    def _value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._text(key)
        if kind != _ARRAY:
            raise self._error(f"{key} has a value of the unknown type {kind}")
        element, count = self._number("I"), self._number("Q")
        if element in _SCALARS:
            width = struct.calcsize(f"<{_SCALARS[element]}")
            return list(struct.unpack(f"<{count}{_SCALARS[element]}", self._take(count * width, key)))
        if element != _STRING:
            raise self._error(
                f"{key} is an array of type {element}, and only arrays of numbers and strings can be read"
            )
        self._room(count * 8, key)
        return [self._text(key) for _ in range(count)]

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._name("a tensor's name")
        count = self._number("I")
        if not 1 <= count <= MAX_DIMENSIONS:
            raise self._error(f"tensor {name!r} has {count} dimensions")
        shape = struct.unpack(f"<{count}Q", self._take(8 * count, name))
        return name, shape, self._number("I"), self._number("Q")

    def _placed(self, entries: list[tuple[str, tuple[int, ...], int, int]], alignment: int) -> dict[str, TensorEntry]:
        """The tensors, each wholly inside the file and none on top of another."""
        if not entries:
            raise self._error("it holds no tensors")
        begin = -(-self._at // alignment) * alignment
        tensors: dict[str, TensorEntry] = {}
        for name, shape, kind, offset in entries:
            type_name, size = self._bytes_of(name, shape, kind)
            if name in tensors:
                raise self._error(f"the tensor {name!r} is there twice")
            if offset % alignment:
                raise self._error(f"tensor {name!r} begins at {offset}, which is no multiple of {alignment}")
            if begin + offset + size > self._size:
                raise self._error(
                    f"cut off or damaged: tensor {name!r} would end at byte {begin + offset + size}, and the file has "
                    f"{self._size}; download it again"
                )
            tensors[name] = TensorEntry(name, shape, type_name, begin + offset, size)
        for one, following in pairwise(sorted(tensors.values(), key=lambda tensor: tensor.start)):
            if one.start + one.size > following.start:
                raise self._error(f"the tensors {one.name!r} and {following.name!r} overlap")
        return tensors

    def _bytes_of(self, name: str, shape: tuple[int, ...], kind: int) -> tuple[str, int]:
        """The name of a tensor's type, and how many bytes it takes."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            known = GGMLQuantizationType(kind)
        except ValueError:
            raise self._error(
                f"tensor {name!r} is of type {kind}, which the installed gguf package does not know"
            ) from None
        if known.name in _NO_WEIGHTS:
            raise self._error(f"tensor {name!r} is of type {known.name}, which no weights come in")
        block, size = GGML_QUANT_SIZES[known]
        if not all(shape) or shape[0] % block:
            raise self._error(
                f"tensor {name!r} of shape {list(shape)} can't be of type {known.name}, which has blocks of {block}"
            )
        return known.name, prod(shape) // block * size

    def _alignment(self, keys: Mapping[str, Any]) -> int:
        alignment = keys.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 2**16 or alignment & (alignment - 1):
            raise self._error(f"general.alignment is {_shown(alignment)}, which is no power of two up to 65536")
        return alignment

    def _name(self, what: str) -> str:
        return self._text(what, MAX_NAME_BYTES)

    def _text(self, what: str, most: int = MAX_HEADER_BYTES) -> str:
        length = self._number("Q")
        if length > most:
            raise self._error(f"damaged: {what} would be {length} bytes long")
        try:
            return self._take(length, what).decode()
        except UnicodeDecodeError:
            raise self._error(f"damaged: {what} holds text that is not UTF-8") from None

    def _number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}"), "a number"))[0]

    def _take(self, count: int, what: str) -> bytes:
        self._room(count, what)
        self._at += count
        return self._stream.read(count)

    def _room(self, count: int, what: str) -> None:
        if self._at + count > self._size:
            raise self._error(
                f"cut off or damaged: {what} would go beyond the file's {self._size} bytes; download it again"
            )
        if self._at + count > MAX_HEADER_BYTES:
            raise self._error(f"damaged: its head would be longer than {MAX_HEADER_BYTES >> 20} MiB")

    def _error(self, problem: str) -> SetupError:
        return SetupError(f"{self._path} cannot be used: {problem}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
