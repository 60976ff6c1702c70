"""The one place that defines what a layer and a position are.

Layers: ``h_0`` are the embeddings that enter the first block, ``h_k`` is the residual stream after k blocks, ``h_L``
the stream before the final norm; a tap with ``final_norm`` reads ``h_L`` after it (Hugging Face's
``hidden_states[L]``).

Positions are rows of a flat token axis on which the tokens of a batch lie in any order. Pure numpy: every backbone
shares it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from inward.errors import InvalidField
from inward.types import Floats, Reading, Readout, Tap

Where = Literal["prompt", "last", "eos", "mean", "tokens"]
"""A ``Position``, or all tokens of the response."""
NOWHERE = -1
"""The row of a token that does not exist (the last token of an empty prompt). Its state reads as NaN, which is no
score."""


class ReadPlace(NamedTuple):
    """A point of the residual stream."""

    layer: int
    final_norm: bool


@dataclass(frozen=True, slots=True)
class Span:
    """Where one response lies: the row of its prompt's last token, its own rows, and the row of the EOS after it."""

    prompt: int
    rows: range
    eos: int = NOWHERE

    @property
    def last(self) -> int:
        """The last token of prompt + response: of an empty response, the prompt's."""
        return self.rows[-1] if self.rows else self.prompt


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """Rows to read ``[R]``. With ``counts_N`` runs of that many rows are averaged to one state each."""

    rows_R: NDArray[np.int64]
    counts_N: NDArray[np.int64] | None = None

    def average(self, states_RD: Floats) -> Floats:
        if self.counts_N is None:
            return states_RD
        starts = np.cumsum(self.counts_N) - self.counts_N
        return np.asarray(np.add.reduceat(states_RD, starts, axis=0) / self.counts_N[:, None], dtype=np.float32)


def select(where: Where, spans: Sequence[Span]) -> Selection:
    """The rows that are read for these responses, in their order: one state each, or one a token for ``tokens``."""
    if where == "tokens":
        return Selection(np.array([row for span in spans for row in span.rows], dtype=np.int64))
    if where == "mean":
        runs = [span.rows or (span.last,) for span in spans]
        rows = np.array([row for run in runs for row in run], dtype=np.int64)
        return Selection(np.maximum(rows, 0), np.array([len(run) for run in runs], dtype=np.int64))
    rows = np.array([getattr(span, where) for span in spans], dtype=np.int64)
    return Selection(np.maximum(rows, 0))  # where there is NOWHERE any row will do: ``Fusion.assemble`` makes it NaN


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """All taps of one place and position as one product: ``[state | state @ weight_DK + bias_K]``, the first part
    only if wanted.
    """

    place: ReadPlace
    where: Where
    state: bool
    weight_DK: Floats
    bias_K: Floats

    def apply(self, states_ND: Floats) -> Floats:
        mapped_NK = states_ND @ self.weight_DK + self.bias_K
        return np.concatenate([states_ND, mapped_NK], axis=1) if self.state else mapped_NK


class _Column(NamedTuple):
    product: int
    start: int
    stop: int


class Fusion:
    """Several readouts joined, so that each place and position costs one product, and taken apart again afterwards."""

    def __init__(self, readouts: Sequence[Readout], *, layers: int, width: int, tokens: bool = False) -> None:
        """Raises InvalidField where a tap does not fit a backbone of this many ``layers`` and this ``width``."""
        taps = [tap for readout in readouts for tap in readout.taps]
        for tap in taps:
            check_tap(tap, layers, width)
        self.tokens = tokens
        self.width = width
        self.products: list[Product] = []
        values = self._fuse([(tap, tap.position) for tap in taps])
        at_tokens = self._fuse([(tap, "tokens") for tap in taps if tap.position != "prompt"]) if tokens else {}
        self._columns = [[(values[id(tap)], at_tokens.get(id(tap))) for tap in readout.taps] for readout in readouts]

    @property
    def places(self) -> set[ReadPlace]:
        return {product.place for product in self.products}

    @property
    def eos(self) -> bool:
        """Whether an EOS has to follow every response."""
        return any(product.where == "eos" for product in self.products)

    def _fuse(self, taps: Sequence[tuple[Tap, Where]]) -> dict[int, _Column]:
        """Appends the products that serve these taps; says for each tap, by identity, which columns are its own."""
        spots: dict[tuple[ReadPlace, Where], list[Tap]] = {}
        for tap, where in taps:
            spots.setdefault((ReadPlace(tap.layer, tap.final_norm), where), []).append(tap)
        columns: dict[int, _Column] = {}
        for (place, where), members in spots.items():
            state = any(tap.weight_DK is None for tap in members)
            start = self.width if state else 0
            weights, biases = [np.zeros((self.width, 0), np.float32)], [np.zeros(0, np.float32)]
            for tap in members:
                if tap.weight_DK is None:
                    columns[id(tap)] = _Column(len(self.products), 0, self.width)
                    continue
                K = tap.weight_DK.shape[1]
                weights.append(tap.weight_DK)
                biases.append(np.zeros(K, np.float32) if tap.bias_K is None else tap.bias_K)
                columns[id(tap)] = _Column(len(self.products), start, start + K)
                start += K
            weight, bias = np.concatenate(weights, axis=1), np.concatenate(biases)
            self.products.append(Product(place, where, state, weight.astype(np.float32), bias.astype(np.float32)))
        return columns

    def assemble(self, outputs: Sequence[Floats], spans: Sequence[Sequence[Span]]) -> list[tuple[Reading, ...]]:
        """Takes the products' outputs apart again.

        Args:
            outputs: of each product, for all responses of all groups in order, ``[N, K]`` (``[T, K]`` where it reads
                ``tokens``).
            spans: of each group's responses.

        Returns:
            for each group its readings, in the order of the readouts.
        """
        flat = [span for group in spans for span in group]
        for product, output in zip(self.products, outputs, strict=True):
            if product.where != "tokens":
                output[[i for i, span in enumerate(flat) if _missing(span, product.where)]] = np.nan
        readings, n, t = [], 0, 0
        for group in spans:
            N, T = len(group), [len(span.rows) for span in group]
            cuts = np.cumsum([t, *T])
            readings.append(tuple(self._reading(columns, outputs, slice(n, n + N), cuts) for columns in self._columns))
            n, t = n + N, t + sum(T)
        return readings

    def _reading(
        self,
        columns: list[tuple[_Column, _Column | None]],
        outputs: Sequence[Floats],
        rows: slice,
        cuts: NDArray[np.int64],
    ) -> Reading:
        values = [outputs[value.product][rows, value.start : value.stop] for value, _ in columns]
        if not self.tokens:
            return Reading(np.concatenate(values, axis=1))
        tokens = []
        for n, (start, stop) in enumerate(pairwise(cuts)):
            parts = [
                np.broadcast_to(values[i][n], (stop - start, values[i].shape[1]))
                if at is None
                else outputs[at.product][start:stop, at.start : at.stop]
                for i, (_, at) in enumerate(columns)
            ]
            tokens.append(np.concatenate(parts, axis=1))
        return Reading(np.concatenate(values, axis=1), tuple(tokens))

    def evaluate(
        self, states: Callable[[ReadPlace, NDArray[np.int64]], Floats], spans: Sequence[Sequence[Span]]
    ) -> list[tuple[Reading, ...]]:
        """The whole of it in numpy: ``states`` gives the rows ``[R]`` of a place as float32 ``[R, D]``."""
        flat = [span for group in spans for span in group]
        outputs = []
        for product in self.products:
            selection = select(product.where, flat)
            outputs.append(product.apply(selection.average(states(product.place, selection.rows_R))))
        return self.assemble(outputs, spans)


def _missing(span: Span, where: Where) -> bool:
    return (span.last if where == "mean" else getattr(span, where)) == NOWHERE


def check_tap(tap: Tap, layers: int, width: int) -> None:
    """Whether a backbone of this many ``layers`` and this ``width`` can be read so.

    Raises:
        InvalidField: it can not, and why.
    """
    if not 0 <= tap.layer <= layers:
        raise InvalidField(
            f"a readout wants layer {tap.layer}, the backbone has layers 0 to {layers}", param="readouts"
        )
    if tap.final_norm and tap.layer != layers:
        raise InvalidField(
            f"final_norm is only defined at the last layer, {layers}, not at layer {tap.layer}", param="readouts"
        )
    if tap.weight_DK is not None and tap.weight_DK.shape[0] != width:
        raise InvalidField(
            f"a readout is made for width {tap.weight_DK.shape[0]}, the backbone has {width}", param="readouts"
        )
