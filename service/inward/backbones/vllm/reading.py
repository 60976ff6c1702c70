"""Reading the residual stream while vLLM runs the model, in vLLM's process; also where the model is compiled, and where
its steps are replayed from CUDA graphs.

Before the model is compiled or warmed up every block's ``forward`` is wrapped: beside its own work it hands what it
passes on to one custom operation, which is opaque to the compiler, so that it runs at every place in every step. All it
needs is there from the start and keeps its size and its address: weights ``[D, K]`` of each place, into which those of
new heads are copied, buffers for one step's numbers, and which of them each column of the table takes. The operation at
the last place puts them into the table, one row for each slot of the KV cache. So heads come and go without a hook, a
graph or a buffer that changes.

On a GPU, a step of few tokens (the only kind that is captured) keeps the states of all places and multiplies them once,
at the end: one small copy a place, and one product. Weights are kept there as two bfloat16 halves, which lose nothing
that a bfloat16 state has.

Depended on: of the forward context the slot mapping of this step, which inside graphs lies at the same address in every
step; that a block takes ``hidden_states`` (and ``residual``) and returns the residual stream as one tensor, or as two
whose sum it is.
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
FIRST_ROWS = 256
"""For which wide rows have room at first."""

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


class Weights:
    """Weights ``[D, K]`` and biases ``[K]`` of all places, which are changed in place."""

    def __init__(self, places: int, width: int, device: torch.device) -> None:
        self._weights_PDK = torch.zeros(places, width, PLACE_COLUMNS, device=device)
        self._biases_PK = torch.zeros(places, PLACE_COLUMNS, device=device)

    def put(self, part: TableColumns) -> None:
        """New ones in some columns of a place."""
        bias_K = _floats(part.bias).to(self._biases_PK.device)
        at = torch.tensor(part.at, dtype=torch.int64, device=bias_K.device)
        self._biases_PK[part.place].index_copy_(0, at, bias_K)
        self._put(part.place, at, _floats(part.weight).view(-1, len(bias_K)).to(bias_K.device))

    def _put(self, place: int, at: torch.Tensor, weight_DK: torch.Tensor) -> None:
        self._weights_PDK[place].index_copy_(1, at, weight_DK)

    def product(self, place: int, states_TD: torch.Tensor, width: int) -> torch.Tensor:
        """float32 ``[T, width]``: the first columns of one place."""
        return torch.addmm(self._biases_PK[place, :width], states_TD.float(), self._weights_PDK[place, :, :width])

    def products(self, states_PTD: torch.Tensor) -> torch.Tensor:
        """float32 ``[P, T, K]``."""
        return torch.baddbmm(self._biases_PK[:, None], states_PTD.float(), self._weights_PDK)


class SplitWeights(Weights):
    """For bfloat16 states on a GPU: each weight is the sum of two bfloat16 numbers, off by 2^-17 of it at most;
    products with a bfloat16 state are exact, and are summed in float32.
    """

    def __init__(self, places: int, width: int, device: torch.device) -> None:
        self._weights_PDK = torch.zeros(places, width, 2 * PLACE_COLUMNS, dtype=torch.bfloat16, device=device)
        self._biases_PK = torch.zeros(places, PLACE_COLUMNS, device=device)

    def _put(self, place: int, at: torch.Tensor, weight_DK: torch.Tensor) -> None:
        high = weight_DK.bfloat16()
        self._weights_PDK[place].index_copy_(1, at, high)
        self._weights_PDK[place].index_copy_(1, at + PLACE_COLUMNS, (weight_DK - high.float()).bfloat16())

    def product(self, place: int, states_TD: torch.Tensor, width: int) -> torch.Tensor:
        both_TK = torch.mm(states_TD, self._weights_PDK[place], out_dtype=torch.float32)
        high, low = both_TK[:, :width], both_TK[:, PLACE_COLUMNS : PLACE_COLUMNS + width]
        return torch.add(high, low).add_(self._biases_PK[place, :width])

    def products(self, states_PTD: torch.Tensor) -> torch.Tensor:
        both_PTK = torch.bmm(states_PTD, self._weights_PDK, out_dtype=torch.float32)
        return both_PTK[..., :PLACE_COLUMNS].add_(both_PTK[..., PLACE_COLUMNS:]).add_(self._biases_PK[:, None])


class ResidualReader:
    """The places of one model (``h_0`` to ``h_L``, and what comes after the final norm) and what is read there."""

    def __init__(
        self,
        model: torch.nn.Module,
        layers: int,
        width: int,
        *,
        tokens: int,
        kept: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """``tokens``: most of one step; ``kept``: most of a step that keeps its states until it ends."""
        global _reader
        places = layers + 2
        kind = SplitWeights if device.type == "cuda" and dtype == torch.bfloat16 else Weights
        self._weights = kind(places, width, device)
        self._states_PTD = torch.zeros(places, min(kept, tokens), width, dtype=dtype, device=device)
        self._numbers_PTK = torch.empty(places, tokens, PLACE_COLUMNS, device=device)
        self._anchor = torch.zeros(1, device=device)  # says to the compiler that reading changes something
        self._sources: dict[int, tuple[int, int]] = {}
        """For each column of the table that is in use: place, and column of the place's product."""
        self._source_2C = torch.zeros(2, TABLE_COLUMNS, dtype=torch.int64, device=device)
        """The same for every column; one that nobody has takes anything."""
        self._widths = [0] * places
        self._wide: dict[int, WideRows] = {}
        self._layer = ""
        self._padding = 0
        self._table: torch.Tensor | None = None
        self._mapping = torch.zeros(0, dtype=torch.int64, device=device)
        """The longest that was seen, whose memory graphs use again and again."""
        self._ran = False
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

    @torch.inference_mode()
    def clear_table(self) -> None:
        """Nothing has been read. It stays where it is."""
        if self._table is not None:
            self._table.fill_(torch.nan)

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
            self._weights.put(part)
            self._sources |= {column: (part.place, k) for column, k in zip(part.columns, part.at, strict=True)}
        self._sources = {column: self._sources[column] for column in live}
        self._widths = [0] * len(self._widths)
        for place, k in self._sources.values():
            self._widths[place] = max(self._widths[place], k + 1)
        source = torch.tensor([self._sources.get(column, (0, 0)) for column in range(TABLE_COLUMNS)]).T
        self._source_2C.copy_(source)

    def install_wide(self, number: int, width: int, parts: Sequence[WidePart]) -> None:
        """From now on wide rows of this layout can be expected."""
        self._ran = False  # while graphs were captured it ran last
        self._wide[number] = WideRows({part.place: WideMap(part, self.device) for part in parts}, width, self.device)

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
        """The operation: the numbers of this step's tokens at one place, and after the last place their rows."""
        mapping = self._slot_mapping()
        if mapping is None:
            return
        T = min(len(mapping), len(hidden))
        if place == 0:
            self._find_wide(mapping[:T])
        if self._states_PTD.shape[1] >= T:
            kept_TD = self._states_PTD[place, :T]
            kept_TD.copy_(hidden[:T]) if residual is None else torch.add(hidden[:T], residual[:T], out=kept_TD)
            self._read_wide(place, 0, kept_TD)
        else:
            self._multiply(place, T, hidden, residual)
        if place == len(self._widths) - 1:
            self._write(mapping[:T])
            self._ran = True

    @torch.inference_mode()
    def finish_step(self, tokens: int) -> None:
        """After a step of these many tokens: what a graph, which can't call us, has left to do."""
        if not self._ran and self._wide and 0 < tokens <= len(self._mapping):
            self._find_wide(self._mapping[:tokens])
            for place in range(len(self._widths)):
                self._read_wide(place, 0, self._states_PTD[place, :tokens])
        self._ran = False

    def _multiply(self, place: int, tokens: int, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
        width = self._widths[place]
        if self._numbers_PTK.shape[1] < tokens:
            self._numbers_PTK = self._numbers_PTK.new_empty(len(self._widths), tokens, PLACE_COLUMNS)
        if not width and not self._wide:
            return
        for start in range(0, tokens, CHUNK):
            chunk = slice(start, min(start + CHUNK, tokens))
            stream_TD = hidden[chunk] if residual is None else hidden[chunk] + residual[chunk]
            if width:
                self._numbers_PTK[place, chunk, :width] = self._weights.product(place, stream_TD, width)
            self._read_wide(place, start, stream_TD)

    def _find_wide(self, slots: torch.Tensor) -> None:
        for rows in self._wide.values():
            rows.find(slots)

    def _read_wide(self, place: int, start: int, stream_TD: torch.Tensor) -> None:
        for rows in self._wide.values():
            if place in rows.maps:
                rows.read(place, start, stream_TD)

    def _write(self, mapping: torch.Tensor) -> None:
        """Puts the numbers of this step's tokens into the table."""
        if self._table is None:
            return
        T = len(mapping)
        if self._states_PTD.shape[1] >= T:
            numbers_PTK = self._weights.products(self._states_PTD[:, :T])
        else:
            numbers_PTK = self._numbers_PTK[:, :T]
        places_C, ks_C = self._source_2C
        slots = mapping.long().where(mapping >= 0, self._padding)
        self._table.index_copy_(0, slots, numbers_PTK[places_C, :, ks_C].T)

    def _slot_mapping(self) -> torch.Tensor | None:
        """The slot of each token of this step, negative for padding; None in a dry run."""
        mappings = get_forward_context().slot_mapping
        mapping: torch.Tensor | None = mappings.get(self._layer) if isinstance(mappings, dict) else None
        if mapping is not None and len(mapping) > len(self._mapping):
            self._mapping = mapping
        return mapping

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

    def __init__(self, maps: dict[int, WideMap], width: int, device: torch.device) -> None:
        self.maps = maps
        self._rows_RK = torch.empty(0, width, device=device)
        self._free: list[int] = []
        self._row: dict[int, int] = {}
        """Of each expected slot."""
        self._here: tuple[torch.Tensor, torch.Tensor] | None = None

    @torch.inference_mode()
    def expect(self, slots: Slots) -> None:
        """This step computes the tokens in these slots."""
        if len(self._free) < len(slots):
            size, more = len(self._rows_RK), max(len(self._rows_RK), len(slots), FIRST_ROWS)
            self._rows_RK = torch.cat([self._rows_RK, self._rows_RK.new_empty(more, self._rows_RK.shape[1])])
            self._free += range(size, size + more)
        rows = []
        for slot in slots.tolist():
            if slot not in self._row:
                self._row[slot] = self._free.pop()
            rows.append(self._row[slot])
        self._rows_RK[torch.tensor(rows, dtype=torch.int64, device=self._rows_RK.device)] = torch.nan

    def find(self, slots: torch.Tensor) -> None:
        """Which of this step's tokens are expected, for what is ``read``."""
        found = [(i, self._row[slot]) for i, slot in enumerate(slots.tolist()) if slot in self._row]
        tokens, rows = torch.tensor(found, dtype=torch.int64, device=slots.device).reshape(-1, 2).T
        self._here = tokens, rows

    def read(self, place: int, start: int, stream_TD: torch.Tensor) -> None:
        """Notes those that are expected of these tokens, which begin with the step's number ``start``."""
        assert self._here is not None
        tokens, rows = self._here
        part = self.maps[place]
        if len(tokens) and (start or len(stream_TD) <= int(tokens[-1])):
            inside = (tokens >= start) & (tokens < start + len(stream_TD))
            tokens, rows = tokens[inside] - start, rows[inside]
        if len(tokens):
            self._rows_RK[rows, part.columns] = part.read(stream_TD[tokens])

    @torch.inference_mode()
    def take(self, slots: Slots) -> torch.Tensor:
        """Of these slots, which are given up."""
        rows = [self._row.pop(slot, None) for slot in slots.tolist()]
        there = [(i, row) for i, row in enumerate(rows) if row is not None]
        taken_NK = self._rows_RK.new_full((len(rows), self._rows_RK.shape[1]), torch.nan)
        at, own = torch.tensor(there, dtype=torch.int64, device=taken_NK.device).reshape(-1, 2).T
        taken_NK[at] = self._rows_RK[own]
        self._free += [row for _, row in there]
        return taken_NK


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
