"""Reading the residual stream while vLLM runs the model, in vLLM's process; also where the model is compiled.

Before the model is compiled or warmed up every block's ``forward`` is wrapped: beside its own work it hands what it
passes on to one custom operation, which is opaque to the compiler, so that it runs at every place in every step. All it
needs is there from the start and keeps its size: weights ``[D, K]`` of each place, into which those of new heads are
copied, and buffers for one step's numbers. At the end of a step they are put into the table, one row for each slot of
the KV cache. So heads come and go without a hook, a graph or a buffer that changes.

Depended on: of the forward context the slot mapping of this step; that a block takes ``hidden_states`` (and
``residual``) and returns the residual stream as one tensor, or as two whose sum it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import numpy as np
import torch

from inward.backbones.vllm.internals import get_forward_context
from inward.backbones.vllm.protocol import PLACE_COLUMNS, TABLE_COLUMNS, TableColumns, WidePart

Slots = np.ndarray[Any, np.dtype[np.int64]]
Rows = np.ndarray[Any, np.dtype[np.float32]]
CHUNK = 2048
"""Tokens of which a float32 copy is made at once."""

_reader: ResidualReader | None = None
_library = torch.library.Library("inward", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("read_stream(Tensor hidden, Tensor? residual, Tensor(a!) anchor, int place) -> ()")  # type: ignore[no-untyped-call]


def _read_stream(hidden: torch.Tensor, residual: torch.Tensor | None, anchor: torch.Tensor, place: int) -> None:
    if _reader is not None:
        _reader.read(place, hidden, residual)


def _nothing(hidden: torch.Tensor, residual: torch.Tensor | None, anchor: torch.Tensor, place: int) -> None:
    return None


_library.impl("read_stream", _read_stream, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("inward::read_stream", _nothing, lib=_library)


class ResidualReader:
    """The places of one model (``h_0`` to ``h_L``, and what comes after the final norm) and what is read there."""

    def __init__(self, model: torch.nn.Module, layers: int, width: int, tokens: int, device: torch.device) -> None:
        """``tokens``: most of one step."""
        global _reader
        places = layers + 2
        self._weights_PDK = torch.zeros(places, width, PLACE_COLUMNS, device=device)
        self._biases_PK = torch.zeros(places, PLACE_COLUMNS, device=device)
        self._buffers_PTK = torch.empty(places, tokens, PLACE_COLUMNS, device=device)
        self._anchor = torch.zeros(1, device=device)  # says to the compiler that reading changes something
        self._sources: dict[int, tuple[int, int]] = {}
        """For each column of the table that is in use: place, and column of the place's product."""
        self._widths = [0] * places
        self._order = torch.zeros(0, dtype=torch.int64, device=device)
        self._wide: dict[int, WideRows] = {}
        self._layer = ""
        self._padding = 0
        self._table: torch.Tensor | None = None
        self._step: tuple[Any, torch.Tensor | None] = (None, None)
        self.device = device
        blocks, self.norm = _parts(model, layers)
        self.norm_forward: Callable[..., Any] = self.norm.forward
        self._wrap(blocks, layers)
        _reader = self

    @torch.inference_mode()
    def open_table(self, slots: int, layer: str) -> None:
        """A row for each slot of the KV cache, and one for padding. ``layer``: an attention layer; all have the same
        slots.
        """
        self._layer, self._padding = layer, slots
        # what was never read is no score
        self._table = torch.full((slots + 1, TABLE_COLUMNS), torch.nan, device=self.device)

    def close_table(self) -> None:
        """Gives its memory back; nothing is read until it is opened again."""
        self._table = None

    @torch.inference_mode()
    def reopen_table(self) -> None:
        """An empty one, as large as before."""
        if self._layer:
            self.open_table(self._padding, self._layer)

    @torch.inference_mode()
    def install(self, parts: Sequence[TableColumns], live: Sequence[int]) -> None:
        """Copies new weights to their columns. ``live``: columns of the table that somebody has; others rest."""
        for part in parts:
            bias = _floats(part.bias).to(self.device)
            at = torch.tensor(part.at, dtype=torch.int64, device=self.device)
            self._weights_PDK[part.place].index_copy_(1, at, _floats(part.weight).view(-1, len(bias)).to(self.device))
            self._biases_PK[part.place].index_copy_(0, at, bias)
            self._sources |= {column: (part.place, k) for column, k in zip(part.columns, part.at, strict=True)}
        self._sources = {column: self._sources[column] for column in live}
        self._widths = [0] * len(self._widths)
        for place, k in self._sources.values():
            self._widths[place] = max(self._widths[place], k + 1)
        starts = np.cumsum([0, *self._widths])
        order = [0] * (max(self._sources, default=-1) + 1)
        for column, (place, k) in self._sources.items():
            order[column] = int(starts[place]) + k
        self._order = torch.tensor(order, dtype=torch.int64, device=self.device)

    def install_wide(self, number: int, width: int, parts: Sequence[WidePart]) -> None:
        """From now on wide rows of this layout can be expected."""
        self._wide[number] = WideRows({part.place: WideMap(part, self.device) for part in parts}, width)

    def retire(self, numbers: Sequence[int]) -> None:
        """Forgets wide layouts."""
        for number in numbers:
            self._wide.pop(number, None)

    @property
    def layouts(self) -> int:
        """Wide layouts that are there."""
        return len(self._wide)

    def rows(self, wide: int) -> TableRows | WideRows | None:
        """Where rows are: the table, or those of a wide layout; None where they are not there any more."""
        if wide:
            return self._wide.get(wide)
        return None if self._table is None else TableRows(self._table)

    def read(self, place: int, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
        """The operation: the numbers of this step's tokens at one place."""
        width = self._widths[place]
        wide = [rows for rows in self._wide.values() if place in rows.maps]
        if not width and not wide:
            return
        slots = self._slots()
        if slots is None:
            return
        T = len(slots)
        if width and self._buffers_PTK.shape[1] < T:
            self._buffers_PTK = self._buffers_PTK.new_empty(len(self._widths), T, PLACE_COLUMNS)
        for start in range(0, T, CHUNK):
            chunk = slice(start, min(start + CHUNK, T))
            stream_TD = hidden[chunk] if residual is None else hidden[chunk] + residual[chunk]
            if width:
                self._buffers_PTK[place, chunk, :width] = torch.addmm(
                    self._biases_PK[place, :width], stream_TD.float(), self._weights_PDK[place, :, :width]
                )
            for rows in wide:
                rows.read(place, slots[chunk], stream_TD)

    @torch.inference_mode()
    def finish_step(self) -> None:
        """Puts the numbers of the step that has run into the table."""
        slots = self._step[1]
        self._step = (None, None)
        if slots is None or self._table is None or not len(self._order):
            return
        T = len(slots)
        parts = [self._buffers_PTK[place, :T, :width] for place, width in enumerate(self._widths) if width]
        row_TK = torch.cat(parts, dim=1).index_select(1, self._order)
        self._table[:, : len(self._order)].index_copy_(0, slots, row_TK)

    def _slots(self) -> torch.Tensor | None:
        """The slot of each token of this step; None in a dry run."""
        context = get_forward_context()
        if context is not self._step[0]:
            mapping = context.slot_mapping.get(self._layer) if isinstance(context.slot_mapping, dict) else None
            self._step = (context, None if mapping is None else mapping.long().where(mapping >= 0, self._padding))
        return self._step[1]

    def _wrap(self, blocks: torch.nn.ModuleList, layers: int) -> None:
        entering = signature(blocks[0].forward)
        for k, block in enumerate(blocks, start=1):
            block.forward = self._reading(block.forward, k, entering if k == 1 else None)
        self.norm.forward = self._reading(self.norm_forward, layers + 1, None, first_only=True)

    def _reading(
        self, forward: Callable[..., Any], place: int, entering: Any, *, first_only: bool = False
    ) -> Callable[..., Any]:
        """``forward`` that also hands on what it returns, and with its signature ``entering`` what enters it."""
        anchor, read = self._anchor, torch.ops.inward.read_stream
        names = list(entering.parameters) if entering is not None else []

        def reading(*args: Any, **kwargs: Any) -> Any:
            if names:
                given = dict(zip(names, args, strict=False)) | kwargs
                read(given["hidden_states"], given.get("residual"), anchor, 0)
            output = forward(*args, **kwargs)
            hidden, residual = _stream(output)
            read(hidden, None if first_only else residual, anchor, place)
            return output

        return reading


class TableRows:
    """Rows of the table, gathered on the device."""

    def __init__(self, table: torch.Tensor) -> None:
        self._table = table

    @torch.inference_mode()
    def take(self, slots: Slots) -> torch.Tensor:
        """Of these slots."""
        return self._table.index_select(0, torch.from_numpy(slots).to(self._table.device, non_blocking=True))


class WideMap:
    """What one place contributes to a wide row."""

    def __init__(self, part: WidePart, device: torch.device) -> None:
        self.columns = slice(part.start, part.stop)
        self._state = part.state
        self._bias_K = _floats(part.bias).to(device)
        self._weight_DK = _floats(part.weight).to(device)
        if len(self._bias_K):
            self._weight_DK = self._weight_DK.view(-1, len(self._bias_K))

    def read(self, states_TD: torch.Tensor) -> torch.Tensor:
        """The numbers of these states, ``[T, K]``."""
        states_TD = states_TD.float()
        if not len(self._bias_K):
            return states_TD
        mapped_TK = torch.addmm(self._bias_K, states_TD, self._weight_DK)
        return torch.cat([states_TD, mapped_TK], dim=1) if self._state else mapped_TK


class WideRows:
    """Wide rows of wanted tokens only, each until it is taken."""

    def __init__(self, maps: dict[int, WideMap], width: int) -> None:
        self.maps = maps
        self._width = width
        self._rows: dict[int, Rows] = {}

    def expect(self, slots: Slots) -> None:
        """This step computes the tokens in these slots."""
        for slot in slots.tolist():
            self._rows[slot] = np.full(self._width, np.nan, np.float32)

    def read(self, place: int, slots: torch.Tensor, stream_TD: torch.Tensor) -> None:
        """Notes those that are expected."""
        part = self.maps[place]
        here = [(i, self._rows[slot]) for i, slot in enumerate(slots.tolist()) if slot in self._rows]
        if here:
            rows = torch.tensor([i for i, _ in here], device=stream_TD.device)
            for numbers, (_, row) in zip(part.read(stream_TD[rows]).cpu().numpy(), here, strict=True):
                row[part.columns] = numbers

    def take(self, slots: Slots) -> torch.Tensor:
        """Of these slots, which are given up."""
        empty = np.full(self._width, np.nan, np.float32)
        return torch.from_numpy(np.stack([self._rows.pop(slot, empty) for slot in slots.tolist()]))


def _parts(model: torch.nn.Module, layers: int) -> tuple[torch.nn.ModuleList, torch.nn.Module]:
    """The blocks, and what comes after them: the final norm."""
    stacks = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, torch.nn.ModuleList) and len(child) == layers
    ]
    if not stacks:
        raise NotImplementedError(f"the model has no list of {layers} blocks")
    parent, name, blocks = stacks[0]
    names = [child for child, _ in parent.named_children()]
    following = names[names.index(name) + 1 :]
    if not following:
        raise NotImplementedError("nothing follows the blocks that could be their final norm")
    return blocks, parent.get_submodule(following[0])


def _stream(output: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a block passes on: one tensor, or two whose sum is the residual stream."""
    values = output if isinstance(output, tuple) else (output,)
    states = [v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()]
    return states[0], states[1] if len(states) > 1 else None


def _floats(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(data, np.float32).copy())
