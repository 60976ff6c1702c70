"""States in a file, however many: written while they are read from the model, and read back a few rows at a time.

The file is what ``saved`` describes. Rows are read, not mapped: memory holds what was asked for, and nothing stays.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Protocol, Self, cast

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from inward.errors import DataError
from inward.offline.states.saved import (
    METADATA,
    Origin,
    PairStates,
    as_numpy,
    check_tensor,
    hash_rows,
    layer_axis,
    layers_of,
    near_duplicates,
)
from inward.types import Doubles, Floats, Indices

BLOCK_BYTES = 64 * 2**20
"""Most float32 states that one block of ``blocks`` holds."""
HALF_MAX = 65_504.0
"""Largest float16. States beyond it (some models have a few huge dimensions) make the file float32."""
_WIDTHS = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
SMALL = ("layers", "group", "length_difference")
"""Tensors of a file of pairs that are no states."""


class PairSource(Protocol):
    """States of N pairs, in memory (``saved.PairStates``) or in a file (``StoredPairs``)."""

    @property
    def layers(self) -> tuple[int, ...]: ...
    @property
    def groups_N(self) -> Indices: ...
    @property
    def length_difference_N(self) -> Doubles | None: ...
    @property
    def origin(self) -> Origin: ...
    @property
    def width(self) -> int: ...
    def __len__(self) -> int: ...

    def take(self, index: Indices, axes: Sequence[int] | None = None) -> tuple[Floats, Floats]:
        """Chosen and rejected states ``[n, L, D]`` of some pairs, float32; ``axes``: entries of ``layers``."""
        ...


class _File:
    """An open file, by its descriptor: reads from several threads do not move each other's position."""

    def __init__(self, path: Path, flags: int = os.O_RDONLY) -> None:
        self.descriptor = os.open(path, flags)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    def read(self, size: int, offset: int) -> bytes:
        return os.pread(self.descriptor, size, offset)


class StoredRows:
    """Rows ``[N, L, D]`` of one tensor in a safetensors file."""

    def __init__(self, file: _File, offset: int, shape: tuple[int, int, int], kind: str) -> None:
        """``offset``: where the tensor begins, in bytes; ``kind``: F16, BF16 or F32."""
        self.shape = shape
        self._file, self._offset, self._kind = file, offset, kind
        self._row = prod(shape[1:]) * _WIDTHS[kind]

    def take(self, index: Indices, axes: Sequence[int] | None = None) -> Floats:
        """Some rows (of some layers), float32; neighbours in the file are read at once."""
        _, layers, width = self.shape
        if axes is not None and len(axes) == 1:
            return self._layer(index, axes[0])
        raw = np.empty((len(index), layers, width), dtype=_stored(self._kind))
        start = 0
        for stop in [*(np.flatnonzero(np.diff(index) != 1) + 1), len(index)]:
            if stop > start:
                self._fill(raw[start:stop], self._offset + int(index[start]) * self._row)
            start = stop
        return _floats(raw if axes is None else raw[:, list(axes)], self._kind)

    def _layer(self, index: Indices, axis: int) -> Floats:
        raw = np.empty((len(index), 1, self.shape[2]), dtype=_stored(self._kind))
        inside = axis * raw[0].nbytes if len(index) else 0
        for i, row in enumerate(index):
            self._fill(raw[i], self._offset + int(row) * self._row + inside)
        return _floats(raw, self._kind)

    def _fill(self, into: NDArray[Any], offset: int) -> None:
        view = memoryview(cast(bytearray, into.view(np.uint8).ravel()))
        done = 0
        while done < len(view):
            read = os.preadv(self._file.descriptor, [view[done:]], offset + done)
            if read == 0:
                raise DataError("the file of states ends too early: it was cut short, or is being written")
            done += read


@dataclass(frozen=True, slots=True, eq=False)
class StoredPairs:
    """A file of pair states, opened; see ``PairSource``."""

    path: Path
    chosen: StoredRows
    rejected: StoredRows
    layers: tuple[int, ...]
    groups_N: Indices
    length_difference_N: Doubles | None
    origin: Origin

    def __len__(self) -> int:
        return self.chosen.shape[0]

    @property
    def width(self) -> int:
        return self.chosen.shape[2]

    def take(self, index: Indices, axes: Sequence[int] | None = None) -> tuple[Floats, Floats]:
        return self.chosen.take(index, axes), self.rejected.take(index, axes)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Opens a file of pair states without reading the states.

        Raises:
            DataError: it is damaged, lacks a tensor, holds lists, or has NaN or infinite entries.
        """
        path = Path(path)
        if not path.is_file():
            raise DataError(f"{path} does not exist or is not a file")
        file = _File(path)
        header, start, small = _header(file, path)
        try:
            origin = Origin.load(header.pop("__metadata__", None))
        except ValueError as error:
            raise DataError(f"{path}: what the file says of its origin is damaged ({error})") from error
        if missing := {"chosen", "rejected", "layers"} - header.keys():
            raise DataError(f"{path} lacks the tensor {', '.join(sorted(missing))}: states of pairs are needed here")
        chosen, rejected = (_rows(file, start, name, header[name], path) for name in ("chosen", "rejected"))
        try:
            layers = layers_of(small["layers"])
            group, difference = (_of_rows(small, name, chosen.shape[0]) for name in ("group", "length_difference"))
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        if chosen.shape != rejected.shape or chosen.shape[1] != len(layers):
            shapes = f"chosen {list(chosen.shape)}, rejected {list(rejected.shape)} and {len(layers)} layers"
            raise DataError(f"{path}: {shapes} do not go together")
        every = np.arange(chosen.shape[0], dtype=np.int64)
        parts = _parts(every, chosen.shape[1] * chosen.shape[2])
        for name, rows in (("chosen", chosen), ("rejected", rejected)):
            for part in parts:
                if not np.isfinite(rows.take(part)).all():
                    raise DataError(f"{path}: {name} has NaN or infinite entries among rows {part[0]} to {part[-1]}")
        return cls(
            path,
            chosen,
            rejected,
            layers,
            near_duplicates(chosen.take(every, [len(layers) // 2])[:, 0]) if group is None else group.astype(np.int64),
            None if difference is None else difference.astype(np.float64),
            origin
            if origin.data_hash
            else replace(origin, data_hash=hash_rows(rows.take(part) for rows in (chosen, rejected) for part in parts)),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Subset:
    """Some pairs of a source; nothing is copied."""

    whole: PairSource
    index_N: Indices

    def __len__(self) -> int:
        return len(self.index_N)

    def take(self, index: Indices, axes: Sequence[int] | None = None) -> tuple[Floats, Floats]:
        return self.whole.take(self.index_N[index], axes)

    @property
    def groups_N(self) -> Indices:
        return self.whole.groups_N[self.index_N]

    @property
    def length_difference_N(self) -> Doubles | None:
        difference_N = self.whole.length_difference_N
        return None if difference_N is None else difference_N[self.index_N]

    @property
    def layers(self) -> tuple[int, ...]:
        return self.whole.layers

    @property
    def width(self) -> int:
        return self.whole.width

    @property
    def origin(self) -> Origin:
        return self.whole.origin


@dataclass(frozen=True, slots=True, eq=False)
class SomeLayers:
    """A source at some of its layers; nothing is copied."""

    whole: PairSource
    layers: tuple[int, ...]

    @classmethod
    def of(cls, whole: PairSource, layers: Sequence[int]) -> PairSource:
        """The source itself, where these are all of its layers.

        Raises:
            DataError: it lacks one.
        """
        for layer in layers:
            layer_axis(whole.layers, layer)
        return whole if tuple(layers) == whole.layers else cls(whole, tuple(layers))

    def __len__(self) -> int:
        return len(self.whole)

    def take(self, index: Indices, axes: Sequence[int] | None = None) -> tuple[Floats, Floats]:
        layers = self.layers if axes is None else [self.layers[axis] for axis in axes]
        return self.whole.take(index, [self.whole.layers.index(layer) for layer in layers])

    @property
    def groups_N(self) -> Indices:
        return self.whole.groups_N

    @property
    def length_difference_N(self) -> Doubles | None:
        return self.whole.length_difference_N

    @property
    def width(self) -> int:
        return self.whole.width

    @property
    def origin(self) -> Origin:
        """The final norm is of the last layer only."""
        origin = self.whole.origin
        return replace(origin, final_norm=origin.final_norm and max(self.whole.layers) in self.layers)


def blocks(source: PairSource, axes: Sequence[int] | None = None) -> Iterator[tuple[Indices, Floats, Floats]]:
    """All pairs in order, as many at once as ``BLOCK_BYTES`` allow: numbers, chosen, rejected.

    ``axes``: entries of ``layers``; None: all of them.
    """
    every = np.arange(len(source), dtype=np.int64)
    for part in _parts(every, 2 * source.width * (len(source.layers) if axes is None else len(axes))):
        chosen, rejected = source.take(part, axes)
        yield part, chosen, rejected


def in_memory(source: PairSource) -> PairStates:
    """All of it, float32."""
    chosen, rejected = source.take(np.arange(len(source), dtype=np.int64))
    return PairStates(chosen, rejected, source.layers, source.groups_N, source.length_difference_N, source.origin)


class PairWriter:
    """Writes states of pairs as they come, in any order, float16 while they fit.

    What is done is on disk after every ``commit``: one who opens the same path for the same rows goes on from there.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, int, int],
        *,
        layers: Sequence[int],
        groups_N: Indices,
        length_difference_N: Doubles,
        origin: Origin,
        made_by: str = "",
    ) -> None:
        """``shape``: ``[N, L, D]`` of each side. ``made_by`` stands for the pass whose groups are committed: another
        one begins anew.

        Raises:
            DataError: the folder cannot be written, or has no room.
        """
        self.path = path
        self._shape = shape
        self._tensors = {
            "layers": np.array(layers, dtype=np.int64),
            "group": groups_N.astype(np.int64),
            "length_difference": length_difference_N.astype(np.float64),
        }
        self._origin, self._made_by = origin, json.dumps(made_by)
        self._partial, self._log = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.done")
        self.done: set[int] = set()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._kind = "F16"
            if not self._resume("F16") and not self._resume("F32"):
                self._begin("F16", self._partial)
        except OSError as error:
            raise DataError(f"can't write states to {path}: {error.strerror or error}") from error
        self._file = _File(self._partial, os.O_RDWR)

    def put(self, row: int, *, chosen: bool, states_LD: Floats) -> None:
        """Keeps one response's states."""
        if self._kind == "F16" and float(np.abs(states_LD).max(initial=0)) > HALF_MAX:
            self._widen()
        _, layers, width = self._shape
        size = layers * width * _WIDTHS[self._kind]
        tensor = 0 if chosen else self._shape[0]
        data = np.ascontiguousarray(states_LD, dtype=_stored(self._kind)).tobytes()
        os.pwrite(self._file.descriptor, data, self._start + (tensor + row) * size)

    def commit(self, groups: Sequence[int]) -> None:
        """Remembers that all rows of these groups are there."""
        with self._log.open("a", encoding="utf-8") as log:
            log.write(json.dumps([int(g) for g in groups]) + "\n")
        self.done.update(groups)

    def close(self) -> StoredPairs:
        """The finished file, in its place."""
        os.fsync(self._file.descriptor)
        self._partial.replace(self.path)
        self._log.unlink(missing_ok=True)
        return StoredPairs.open(self.path)

    def _head(self, kind: str) -> bytes:
        """The file up to the states: header and small tensors."""
        fields: dict[str, Any] = {"__metadata__": {METADATA: self._origin.dump()}}
        at = 0
        for name, tensor in self._tensors.items():
            fields[name] = {
                "dtype": "I64" if tensor.dtype == np.int64 else "F64",
                "shape": list(tensor.shape),
                "data_offsets": [at, at := at + tensor.nbytes],
            }
        size = prod(self._shape) * _WIDTHS[kind]
        for name in ("chosen", "rejected"):
            fields[name] = {"dtype": kind, "shape": list(self._shape), "data_offsets": [at, at := at + size]}
        header = json.dumps(fields).encode()
        header += b" " * (-len(header) % 8)
        return len(header).to_bytes(8, "little") + header + b"".join(t.tobytes() for t in self._tensors.values())

    def _begin(self, kind: str, path: Path) -> None:
        head = self._head(kind)
        with path.open("wb") as file:
            file.write(head)
            if size := 2 * prod(self._shape) * _WIDTHS[kind]:
                os.posix_fallocate(file.fileno(), len(head), size)  # a full disk shows now, not after hours
        self._kind, self._start = kind, len(head)
        if path == self._partial:
            self._log.write_text(f"{self._made_by}\n", encoding="utf-8")

    def _resume(self, kind: str) -> bool:
        """Whether an unfinished file of the same pass for the same rows is there; what it holds is done, then."""
        head = self._head(kind)
        if not self._partial.is_file() or not self._log.is_file():
            return False
        made_by, *committed = self._log.read_text(encoding="utf-8").splitlines() or [""]
        if made_by != self._made_by:
            return False
        with self._partial.open("rb") as file:
            if file.read(len(head)) != head:
                return False
        self._kind, self._start = kind, len(head)
        for line in committed:
            try:
                self.done.update(json.loads(line))
            except ValueError:  # the line that was being written when the process ended
                break
        return True

    def _widen(self) -> None:
        """The same file in float32: a state came that float16 does not hold."""
        old, start = self._file, self._start
        wider = self._partial.with_name(f"{self._partial.name}.wider")
        self._begin("F32", wider)
        rows = StoredRows(old, start, (2 * self._shape[0], *self._shape[1:]), "F16")
        self._file = _File(wider, os.O_RDWR)
        size = prod(self._shape[1:]) * 4
        for part in _parts(np.arange(rows.shape[0], dtype=np.int64), prod(self._shape[1:])):
            os.pwrite(self._file.descriptor, rows.take(part).tobytes(), self._start + int(part[0]) * size)
        wider.replace(self._partial)


def _parts(index: Indices, numbers_a_row: int) -> list[Indices]:
    step = max(1, BLOCK_BYTES // (4 * max(1, numbers_a_row)))
    return [index[start : start + step] for start in range(0, len(index), step)]


def _header(file: _File, path: Path) -> tuple[dict[str, Any], int, dict[str, NDArray[Any]]]:
    """The header of a safetensors file, where its data begins, and the tensors that are no states."""
    try:
        with safe_open(path, framework="pt") as checked:  # which it is by this
            size = int.from_bytes(file.read(8, 0), "little")
            there = set(checked.keys()).intersection(SMALL)
            small = {name: as_numpy(checked.get_tensor(name)) for name in there}
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} is not a readable safetensors file of states ({error})") from error
    return json.loads(file.read(size, 8)), 8 + size, small


def _rows(file: _File, start: int, name: str, entry: Mapping[str, Any], path: Path) -> StoredRows:
    shape, kind = tuple(entry["shape"]), entry["dtype"]
    if len(shape) != 3 or kind not in _WIDTHS:
        known = ", ".join(_WIDTHS)
        raise DataError(f"{path}: {name} must be [rows, layers, width] in {known}; it is {list(shape)} in {kind}")
    return StoredRows(file, start + entry["data_offsets"][0], shape, kind)


def _of_rows(small: Mapping[str, NDArray[Any]], name: str, rows: int) -> NDArray[Any] | None:
    """A number of each row, where the file has them."""
    if name in small:
        check_tensor(name, small[name], (rows,))
    return small.get(name)


def _stored(kind: str) -> np.dtype[Any]:
    """The numpy type of the bytes; numpy knows no bfloat16."""
    return np.dtype({"F16": "float16", "BF16": "uint16", "F32": "float32", "F64": "float64"}[kind])


def _floats(raw: NDArray[Any], kind: str) -> Floats:
    if kind == "BF16":  # the upper half of a float32
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32, copy=False)
