"""Which numbers are read at every token, where they stand, and how they become readings again. Pure numpy.

A readout's numbers stand in columns: of the table that has a row for every cached token, or of rows of its own where it
needs more than the table has (``WideLayout``). The table never grows: columns belong to readouts that somebody still
holds, and whoever comes later takes those of the dead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from inward.backbones.readout import Fusion, ReadPlace, check_tap
from inward.backbones.vllm.protocol import PLACE_COLUMNS, TABLE_COLUMNS, TableColumns, WidePart
from inward.types import BASE, Floats, Group, Position, Reading, Readout, Tap

Columns = Mapping[int, NDArray[np.int64]]
"""For each tap, by identity, where its numbers stand in a row."""


@dataclass(frozen=True, slots=True)
class Want:
    """Which tokens of one text have to be read: positions ``start`` to ``stop``."""

    start: int
    stop: int
    prompt: int
    """Position of the prompt's last token; -1 if the prompt is empty."""
    response: range
    """Positions of the response's tokens."""
    eos: int = -1

    @property
    def last(self) -> int:
        return self.response[-1] if self.response else self.prompt


def want(prompt: int, response: int, positions: Iterable[Position], *, tokens: bool) -> Want:
    """The tokens to read of a prompt and a response of these many tokens (an EOS follows where ``eos`` is among
    ``positions``).
    """
    wanted = set(positions)
    end = prompt + response
    eos = end if "eos" in wanted else -1
    start = max(end - 1, 0)
    if tokens or "mean" in wanted:
        start = min(start, prompt)
    if "prompt" in wanted:
        start = min(start, max(prompt - 1, 0))
    return Want(start, end + (eos >= 0), prompt - 1, range(prompt, end), eos)


@dataclass(slots=True, eq=False)
class _Held:
    """Where one readout's numbers stand, and how many calls read them now."""

    parts: list[_Part]
    calls: int = 0

    def columns(self) -> dict[int, NDArray[np.int64]]:
        return {tap: np.array(part.columns, dtype=np.int64) for part in self.parts for tap in part.taps}


@dataclass(slots=True, eq=False)
class _Part:
    """One weight at one place; ``taps`` that read it at several positions share it."""

    place: int
    weight_DK: Floats
    bias_K: Floats
    taps: list[int]
    at: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)


class ColumnTable:
    """Who has which columns of the table. ``number`` changes when columns get a new meaning, and keeps apart the cached
    tokens that were read before from those read after.
    """

    def __init__(self, *, layers: int, width: int) -> None:
        self.number = 0
        self._layers, self._width = layers, width
        self._held: WeakKeyDictionary[Readout, _Held] = WeakKeyDictionary()  # the latest used is the last

    def __contains__(self, readout: Readout) -> bool:
        return readout in self._held

    def place(self, readouts: Sequence[Readout]) -> list[TableColumns] | None:
        """Gives columns to those that have none, and what has to be installed for them; None where they don't fit.

        Raises:
            InvalidField: a tap does not fit the backbone.
        """
        new = {readout: self._parts(readout) for readout in readouts if readout not in self._held}
        if not new:
            return []
        if any(parts is None for parts in new.values()):
            return None
        parts = [part for own in new.values() for part in own or ()]
        if not self._room(parts, readouts):
            return None
        for part in parts:
            part.at = self._free(len(part.bias_K), PLACE_COLUMNS, [p.at for p in self._at(part.place, parts)])
            part.columns = self._free(len(part.bias_K), TABLE_COLUMNS, [p.columns for p in self._all(parts)])
        for readout, own in new.items():
            self._held[readout] = _Held(own or [])
        self.number += 1
        return [TableColumns(p.place, p.at, p.columns, p.weight_DK.tobytes(), p.bias_K.tobytes()) for p in parts]

    def forget(self, readouts: Iterable[Readout]) -> None:
        """Takes the columns back: what was to be installed there was not."""
        for readout in readouts:
            self._held.pop(readout, None)

    def live(self) -> list[int]:
        """Columns of the table that belong to somebody."""
        return sorted(column for part in self._all(()) for column in part.columns)

    def begin(self, readouts: Iterable[Readout]) -> Columns:
        """A call reads these, which have their columns; until ``end`` nobody else gets them."""
        columns: dict[int, NDArray[np.int64]] = {}
        for readout in readouts:
            held = self._held.pop(readout)
            self._held[readout] = held
            held.calls += 1
            columns |= held.columns()
        return columns

    def end(self, readouts: Iterable[Readout]) -> None:
        """The call is over."""
        for readout in readouts:
            self._held[readout].calls -= 1

    def _parts(self, readout: Readout) -> list[_Part] | None:
        """None where a tap reads whole states, which are never kept."""
        parts: dict[tuple[int, int, int], _Part] = {}
        for tap in readout.taps:
            check_tap(tap, self._layers, self._width)
            if tap.weight_DK is None:
                return None
            place = place_of(tap, self._layers)
            bias = np.zeros(tap.weight_DK.shape[1], np.float32) if tap.bias_K is None else tap.bias_K
            key = (place, id(tap.weight_DK), id(tap.bias_K))
            part = parts.setdefault(
                key,
                _Part(
                    place, tap.weight_DK.astype(np.float32, copy=False), bias.astype(np.float32, copy=False), taps=[]
                ),
            )
            part.taps.append(id(tap))
        return list(parts.values())

    def _room(self, parts: Sequence[_Part], wanted: Sequence[Readout]) -> bool:
        """Whether there is room for ``parts``, after idle readouts gave way where need be: the longest unused first."""
        if not _fit(parts):
            return False
        while not _fit(self._all(parts)):
            idle = next((r for r, held in self._held.items() if not held.calls and r not in wanted), None)
            if idle is None:
                return False
            del self._held[idle]
        return True

    def _all(self, more: Sequence[_Part]) -> list[_Part]:
        return [*(part for held in self._held.values() for part in held.parts), *more]

    def _at(self, place: int, more: Sequence[_Part]) -> list[_Part]:
        return [part for part in self._all(more) if part.place == place]

    @staticmethod
    def _free(n: int, size: int, taken: Iterable[Sequence[int]]) -> list[int]:
        used = {column for columns in taken for column in columns}
        return [column for column in range(size) if column not in used][:n]


def _fit(parts: Iterable[_Part]) -> bool:
    """Whether the table, and the product of each place, is wide enough for them."""
    widths: Counter[int] = Counter()
    for part in parts:
        widths[part.place] += len(part.bias_K)
    return widths.total() <= TABLE_COLUMNS and all(width <= PLACE_COLUMNS for width in widths.values())


class WideLayout:
    """Rows of their own for one call: all taps of its readouts, place by place, whole states among them."""

    def __init__(self, number: int, readouts: Sequence[Readout], *, layers: int, width: int) -> None:
        """Raises InvalidField where a tap does not fit a backbone of this many ``layers`` and this ``width``."""
        self.number = number
        self.parts: list[WidePart] = []
        self.columns: dict[int, NDArray[np.int64]] = {}
        places: dict[ReadPlace, list[Tap]] = {}
        for tap in (tap for readout in readouts for tap in readout.taps):
            places.setdefault(ReadPlace(tap.layer, tap.final_norm), []).append(tap)
        for place, taps in places.items():
            self._add(place, taps, layers, width)

    @property
    def width(self) -> int:
        """Columns of a row."""
        return self.parts[-1].stop if self.parts else 0

    def _add(self, place: ReadPlace, taps: Sequence[Tap], layers: int, width: int) -> None:
        start = self.width
        alike = [Readout((Tap(place.layer, "last", tap.weight_DK, tap.bias_K, place.final_norm),)) for tap in taps]
        (product,) = Fusion(alike, layers=layers, width=width).products
        column = start + (width if product.state else 0)
        for tap in taps:
            if tap.weight_DK is None:
                self.columns[id(tap)] = np.arange(start, start + width)
            else:
                self.columns[id(tap)] = np.arange(column, column + tap.weight_DK.shape[1])
                column += tap.weight_DK.shape[1]
        at = layers + 1 if place.final_norm else place.layer
        weight, bias = product.weight_DK.tobytes(), product.bias_K.tobytes()
        self.parts.append(WidePart(at, start, column, product.state, weight, bias))


def place_of(tap: Tap, layers: int) -> int:
    """The number of the place that a tap reads, as the worker counts them."""
    return layers + 1 if tap.final_norm else tap.layer


def readings(
    columns: Columns, readouts: Sequence[Readout], texts: Sequence[tuple[Want, Floats]], *, tokens: bool
) -> tuple[Reading, ...]:
    """Readings of one group.

    Args:
        columns: of every tap of ``readouts``.
        texts: for each response what was wanted and its rows ``[stop - start, width]``.
    """
    return tuple(_reading(columns, readout, texts, tokens) for readout in readouts)


def _reading(columns: Columns, readout: Readout, texts: Sequence[tuple[Want, Floats]], tokens: bool) -> Reading:
    values = [
        np.concatenate([_at(tap.position, wanted, rows[:, columns[id(tap)]]) for tap in readout.taps])
        for wanted, rows in texts
    ]
    K = sum(len(columns[id(tap)]) for tap in readout.taps)
    values_NK = np.stack(values) if values else np.zeros((0, K), np.float32)
    if not tokens:
        return Reading(values_NK)
    return Reading(values_NK, tuple(_tokens(columns, readout, wanted, rows) for wanted, rows in texts))


def _tokens(columns: Columns, readout: Readout, wanted: Want, rows: Floats) -> Floats:
    T = len(wanted.response)
    own = rows[wanted.response.start - wanted.start : wanted.response.stop - wanted.start]
    parts = []
    for tap in readout.taps:
        at = columns[id(tap)]
        repeated = tap.position == "prompt"
        parts.append(np.tile(_at("prompt", wanted, rows[:, at]), (T, 1)) if repeated else own[:T, at])
    return np.concatenate(parts, axis=1)


def _at(position: Position, wanted: Want, rows: Floats) -> Floats:
    """One row ``[K]`` for a response; NaN where there is no such token."""
    if position == "mean" and wanted.response:
        first = wanted.response.start - wanted.start
        return np.asarray(rows[first : first + len(wanted.response)].mean(axis=0), dtype=np.float32)
    token = {"prompt": wanted.prompt, "eos": wanted.eos}.get(position, wanted.last)
    return rows[token - wanted.start] if token >= 0 else np.full(rows.shape[1], np.nan, np.float32)


@dataclass(frozen=True, slots=True)
class Policy:
    """A version of the policy in vLLM. ``number`` is new for each load, so nothing of an earlier one is mistaken for
    it.
    """

    version: str = BASE
    number: int = 0
    folder: str = ""
    """Of the adapter; empty for the base."""


@dataclass(frozen=True, slots=True, eq=False)
class ReadRequest:
    """What one call asks for, where its numbers stand, and the keys of its requests."""

    policy: Policy
    layout: int = 0
    """Number of the table's columns as they were when it began."""
    columns: Columns = field(default_factory=dict)
    readouts: tuple[Readout, ...] = ()
    tokens: bool = False
    wide: int = 0
    """Number of the wide layout that it reads; 0 for the table."""
    keys: list[str] = field(default_factory=list)

    @property
    def salt(self) -> str:
        """What keeps the cached tokens of its columns and policy apart from those of others."""
        return f"inward-{self.layout}-{self.policy.number}"

    @property
    def positions(self) -> set[Position]:
        return {tap.position for readout in self.readouts for tap in readout.taps}

    @property
    def eos(self) -> bool:
        """Whether an EOS has to follow every response."""
        return "eos" in self.positions

    def want(self, group: Group, i: int) -> Want:
        """The tokens to read of the group's response number ``i``."""
        return want(len(group.prompt_ids), len(group.responses_ids[i]), self.positions, tokens=self.tokens)

    def selected(self) -> tuple[list[int], Columns]:
        """The columns of a row that it needs, each once, and where its taps' numbers stand among them."""
        needed = sorted({int(column) for at in self.columns.values() for column in at})
        place = {column: i for i, column in enumerate(needed)}
        return needed, {tap: np.array([place[int(c)] for c in at], np.int64) for tap, at in self.columns.items()}
