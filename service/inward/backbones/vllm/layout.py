"""Which numbers are read at every token, and how they become readings again. Pure numpy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from inward.backbones.readout import Fusion, Product, ReadPlace
from inward.types import BASE, Floats, Group, Position, Reading, Readout, Tap

COLUMNS = 1024
"""Most numbers a token that are kept for every cached token. What needs more (whole states) gets an edition of its
own for one call."""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What is read at one place: columns ``start`` to ``stop`` of a row."""

    product: Product
    start: int
    stop: int


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


class ReadoutLayout:
    """The columns that are read at every token while this edition is the current one: all taps of its readouts,
    place by place.
    """

    def __init__(
        self, number: int, readouts: Sequence[Readout], *, layers: int, width: int, wide: bool = False
    ) -> None:
        """``wide``: keep only the tokens that a request wants, and look nothing up in the prefix cache.

        Raises InvalidField where a tap does not fit a backbone of this many ``layers`` and this ``width``.
        """
        self.number = number
        self.wide = wide
        self.readouts = tuple(readouts)
        self.parts: list[Part] = []
        self._columns: dict[int, slice] = {}
        places: dict[ReadPlace, list[Tap]] = {}
        for tap in (tap for readout in readouts for tap in readout.taps):
            places.setdefault(ReadPlace(tap.layer, tap.final_norm), []).append(tap)
        for place, taps in places.items():
            self._add(place, taps, layers, width)

    def encoded(self) -> list[tuple[Any, ...]]:
        """Its parts as ``worker.ReadingWorker.inward_install`` takes them."""
        return [
            (
                p.product.place.layer,
                p.product.place.final_norm,
                p.start,
                p.stop,
                p.product.state,
                p.product.weight_DK.tobytes(),
                p.product.bias_K.tobytes(),
            )
            for p in self.parts
        ]

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
                self._columns[id(tap)] = slice(start, start + width)
            else:
                self._columns[id(tap)] = slice(column, column + tap.weight_DK.shape[1])
                column += tap.weight_DK.shape[1]
        self.parts.append(Part(product, start, column))

    def readings(
        self, readouts: Sequence[Readout], texts: Sequence[tuple[Want, Floats]], *, tokens: bool
    ) -> tuple[Reading, ...]:
        """Readings of one group.

        Args:
            readouts: some of this edition's.
            texts: for each response what was wanted and its rows ``[stop - start, width]``.
        """
        return tuple(self._reading(readout, texts, tokens) for readout in readouts)

    def _reading(self, readout: Readout, texts: Sequence[tuple[Want, Floats]], tokens: bool) -> Reading:
        values = [
            np.concatenate([_at(tap.position, wanted, rows[:, self._columns[id(tap)]]) for tap in readout.taps])
            for wanted, rows in texts
        ]
        values_NK = (
            np.stack(values) if values else np.zeros((0, sum(self._width(tap) for tap in readout.taps)), np.float32)
        )
        if not tokens:
            return Reading(values_NK)
        return Reading(values_NK, tuple(self._tokens(readout, wanted, rows) for wanted, rows in texts))

    def _tokens(self, readout: Readout, wanted: Want, rows: Floats) -> Floats:
        T = len(wanted.response)
        own = rows[wanted.response.start - wanted.start : wanted.response.stop - wanted.start]
        parts = []
        for tap in readout.taps:
            columns = self._columns[id(tap)]
            repeated = tap.position == "prompt"
            parts.append(np.tile(_at("prompt", wanted, rows[:, columns]), (T, 1)) if repeated else own[:T, columns])
        return np.concatenate(parts, axis=1)

    def _width(self, tap: Tap) -> int:
        columns = self._columns[id(tap)]
        return int(columns.stop - columns.start)


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
    """What one call asks for, and the keys of its requests."""

    edition: ReadoutLayout
    policy: Policy
    readouts: tuple[Readout, ...] = ()
    tokens: bool = False
    keys: list[str] = field(default_factory=list)

    @property
    def salt(self) -> str:
        """What keeps the cached tokens of its edition and policy apart from those of others."""
        return f"inward-{self.edition.number}-{self.policy.number}"

    @property
    def positions(self) -> set[Position]:
        return {tap.position for readout in self.readouts for tap in readout.taps}

    @property
    def eos(self) -> bool:
        """Whether an EOS has to follow every response."""
        return "eos" in self.positions

    def want(self, group: Group, i: int) -> Want:
        return want(len(group.prompt_ids), len(group.responses_ids[i]), self.positions, tokens=self.tokens)


def succeeding(
    current: ReadoutLayout, readouts: Sequence[Readout], number: int, *, layers: int, width: int
) -> ReadoutLayout:
    """The edition for a call that asks for ``readouts``: ``current`` if it has them all, else a new one with this
    ``number``.

    A new one keeps as many of the current readouts as there is room for, the latest first, unless it is wide.
    """
    known = {id(readout) for readout in current.readouts}
    if all(id(readout) in known for readout in readouts):
        return current
    edition = ReadoutLayout(number, readouts, layers=layers, width=width)
    if edition.width > COLUMNS:
        return ReadoutLayout(number, readouts, layers=layers, width=width, wide=True)
    for older in reversed(current.readouts):  # the latest are at the end
        if all(older is not readout for readout in edition.readouts):
            larger = ReadoutLayout(number, (older, *edition.readouts), layers=layers, width=width)
            if larger.width > COLUMNS:
                break
            edition = larger
    return edition
