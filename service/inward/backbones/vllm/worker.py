"""The part inside vLLM's process, and the only one that knows vLLM's insides (``tests/backbones/test_vllm.py`` pins
each).

Depended on: the worker classes and their ``load_model``, ``get_kv_cache_spec`` and ``execute_model``; the fields of two
kinds of KV cache; of a ``SchedulerOutput`` the new, cached and finished requests with their block ids; of the forward
context the slot mapping; that a block returns the residual stream as one tensor, or as two whose sum it is. A token's
slot is ``block id * block size + offset``: rows are found by slot, so the order of requests in a batch does not matter,
nor chunked prefill, preemption or padding.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from vllm.forward_context import get_forward_context
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker

    from inward.backbones.vllm import cpu_lora

    class RewindingGenerator(torch.Generator):
        """For a seeded request whose prompt comes in chunks vLLM (0.32) rewinds the generator after each chunk, by an
        offset that CPU generators don't have: the engine would die of it. Nothing has been drawn by then, so back to
        the seed is the same.
        """

        def get_offset(self) -> int:
            return 4  # vLLM takes 4 off for one draw

        def set_offset(self, offset: int) -> torch.Generator:
            return self.manual_seed(self.initial_seed())

    torch.Generator = RewindingGenerator  # type: ignore[misc]
    cpu_lora.install()
else:
    from vllm.v1.worker.gpu_worker import Worker

Slots = np.ndarray[Any, np.dtype[np.int64]]
Rows = np.ndarray[Any, np.dtype[np.float32]]
OWNER = "INWARD_VLLM_OWNER"
"""Environment variable with the id of the process that opened the engine."""
ARGUMENT = "inward"
"""Key of ``SamplingParams.extra_args`` under which a request says what to gather: key, edition, start (see
``drawing``)."""


class ReadingWorker(Worker):  # type: ignore[misc]
    """vLLM's worker, with an ear on the model. Methods named ``inward_…`` are called through ``collective_rpc``."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        _end_with(int(os.environ[OWNER]))
        super().load_model(*args, **kwargs)
        self._ledger = Ledger()
        self._tables: dict[int, Table | Excerpt] = {}
        self._ear = Ear(self.model_runner.get_model(), self.model_config.hf_text_config.num_hidden_layers, self._tables)

    def get_kv_cache_spec(self) -> dict[str, Any]:
        """Where all layers have a sliding window vLLM forgets the tokens that it has left, and their rows would go with
        them. So they are kept, as vLLM itself keeps them where only some layers have one; attention computes the same.
        """
        specs: dict[str, Any] = super().get_kv_cache_spec()
        if all(isinstance(spec, SlidingWindowSpec) for spec in specs.values()):
            return {name: _kept(spec) for name, spec in specs.items()}
        return specs

    def execute_model(self, scheduler_output: Any) -> Any:
        if self.rank == 0:  # under tensor parallelism every rank has the whole residual stream
            self._follow(scheduler_output)
        return super().execute_model(scheduler_output)

    def _follow(self, scheduler_output: Any) -> None:
        for request in self._ledger.finished(scheduler_output.finished_req_ids):
            self._gather(request)  # before this step may write to the slots that the request has left
        for request, since in self._ledger.note(scheduler_output):
            if isinstance(table := self._tables.get(request.edition), Excerpt):
                table.expect(request.slots(self._ledger.block_size, since))

    def inward_install(self, number: int, width: int, wide: bool, parts: Sequence[Sequence[Any]]) -> None:
        """Begins an edition of ``width`` columns. A part: layer, final norm, start, stop, state, weight and bias as
        float32 bytes.
        """
        if self.rank > 0:
            return
        group, *others = self.model_runner.kv_cache_config.kv_cache_groups
        if others or not isinstance(group.kv_cache_spec, FullAttentionSpec):
            raise NotImplementedError(
                "the model does not keep all of its tokens in one kind of cache (recurrent layers, or windows of "
                "several sizes)"
            )
        self._ear.layer = group.layer_names[0]
        self._ledger.block_size = group.kv_cache_spec.block_size
        slots = self.model_runner.kv_cache_config.num_blocks * self._ledger.block_size
        maps = {
            (layer, norm): Map.of(start, stop, state, weight, bias, self.device)
            for layer, norm, start, stop, state, weight, bias in parts
        }
        self._ear.slots = slots
        self._tables[number] = Excerpt(maps, width) if wide else Table(maps, width, slots, self.device)
        self._ear.listen()

    def inward_retire(self, number: int) -> None:
        """Forgets an edition."""
        self._tables.pop(number, None)
        self._ear.listen()

    def inward_take(self, keys: Sequence[str], forget: Sequence[str]) -> tuple[bytes, list[int]]:
        """The rows of finished requests: float32, one request after the other, and how many each has. Nothing is
        kept of ``forget``.
        """
        if self.rank > 0:
            return b"", []
        for key in forget:
            self._ledger.forget(key)
        for request in self._ledger.ending(keys):  # no step has run since they ended
            self._gather(request)
        rows = [self._ledger.gathered.pop(key) for key in keys]
        return b"".join(part.tobytes() for part in rows), [len(part) for part in rows]

    def inward_norm(self, states: bytes) -> bytes:
        """The final norm of float32 states ``[N, D]``: what position ``final_norm`` must read if the states are
        those of the last layer.
        """
        rows = torch.from_numpy(np.frombuffer(states, np.float32).copy()).view(
            -1, int(self.model_config.get_hidden_size())
        )
        with torch.inference_mode():
            normed = _first(self._ear.norm.forward(rows.to(self.device, self.model_config.dtype)))
        return bytes(normed.float().cpu().numpy().tobytes())

    def inward_held(self) -> tuple[int, int, int]:
        """Requests followed, gathered and not yet taken; editions. For tests: without requests in flight it is (0,
        0, …).
        """
        return len(self._ledger.requests), len(self._ledger.gathered), len(self._tables)

    def _gather(self, request: Request) -> None:
        table = self._tables.get(request.edition)
        if table is not None:
            self._ledger.gathered[request.key] = table.take(request.slots(self._ledger.block_size))


@dataclass(slots=True)
class Request:
    """A request whose rows somebody wants."""

    key: str
    edition: int
    start: int
    blocks: list[int]
    computed: int
    """Tokens that are, or after this step will be, in the cache."""

    def slots(self, block_size: int, since: int = 0) -> Slots:
        """Of the tokens from ``start``, or ``since``, on."""
        positions = np.arange(max(self.start, since), self.computed)
        return np.asarray(
            np.asarray(self.blocks, dtype=np.int64)[positions // block_size] * block_size + positions % block_size
        )


@dataclass(slots=True)
class Ledger:
    """Which blocks the wanted requests hold, by what the scheduler tells each step."""

    block_size: int = 0
    requests: dict[str, Request] = field(default_factory=dict)
    gathered: dict[str, Rows] = field(default_factory=dict)

    def note(self, step: Any) -> list[tuple[Request, int]]:
        """Takes in a ``SchedulerOutput``; gives its wanted requests, and how many tokens each had before.

        A session that goes on comes as a new request with the same id.
        """
        stepping: list[tuple[Request, int]] = []
        for new in step.scheduled_new_reqs:
            wish = ((new.sampling_params and new.sampling_params.extra_args) or {}).get(ARGUMENT)
            if wish:
                key, edition, start = wish
                computed = new.num_computed_tokens + step.num_scheduled_tokens[new.req_id]
                self.requests[new.req_id] = Request(key, edition, start, list(new.block_ids[0]), computed)
                stepping.append((self.requests[new.req_id], new.num_computed_tokens))
        cached = step.scheduled_cached_reqs
        for req_id, blocks, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            request = self.requests.get(req_id)
            if request is not None:
                if req_id in cached.resumed_req_ids:
                    request.blocks = []
                request.blocks += blocks[0] if blocks else []
                request.computed = computed + step.num_scheduled_tokens[req_id]
                stepping.append((request, computed))
        return stepping

    def finished(self, ids: set[str]) -> list[Request]:
        return [self.requests.pop(req_id) for req_id in ids if req_id in self.requests]

    def ending(self, keys: Sequence[str]) -> list[Request]:
        """Requests that have ended, which the next step will say."""
        wanted = set(keys)
        return self.finished({req_id for req_id, request in self.requests.items() if request.key in wanted})

    def forget(self, key: str) -> None:
        self.gathered.pop(key, None)
        self.ending([key])


@dataclass(slots=True, eq=False)
class Map:
    """What one place contributes to a row."""

    columns: slice
    state: bool
    weight_DK: torch.Tensor
    bias_K: torch.Tensor

    @classmethod
    def of(cls, start: int, stop: int, state: bool, weight: bytes, bias: bytes, device: torch.device) -> Map:
        def tensor(data: bytes) -> torch.Tensor:
            return torch.from_numpy(np.frombuffer(data, np.float32).copy()).to(device)

        bias_K = tensor(bias)
        return cls(
            slice(start, stop), state, tensor(weight).view(-1, len(bias_K)) if len(bias_K) else tensor(b""), bias_K
        )

    def read(self, states_TD: torch.Tensor) -> torch.Tensor:
        states_TD = states_TD.float()
        if not len(self.bias_K):
            return states_TD
        mapped_TK = torch.addmm(self.bias_K, states_TD, self.weight_DK)
        return torch.cat([states_TD, mapped_TK], dim=1) if self.state else mapped_TK


Maps = dict[tuple[int, bool], Map]
"""By layer, and whether after the final norm."""


class Table:
    """The rows of one edition on the device: one for each slot of the KV cache, and one for padding."""

    def __init__(self, maps: Maps, width: int, slots: int, device: torch.device) -> None:
        self.maps = maps
        self._rows = torch.full((slots + 1, width), torch.nan, device=device)  # what was never read is no score

    def hear(self, part: Map, slots: torch.Tensor, stream_TD: torch.Tensor) -> None:
        self._rows[:, part.columns].index_copy_(0, slots, part.read(stream_TD))

    def take(self, slots: Slots) -> Rows:
        return self._rows.index_select(0, torch.from_numpy(slots).to(self._rows.device)).cpu().numpy()


class Excerpt:
    """The rows of one wide edition: only of wanted tokens, each until it is taken."""

    def __init__(self, maps: Maps, width: int) -> None:
        self.maps = maps
        self._width = width
        self._rows: dict[int, Rows] = {}

    def expect(self, slots: Slots) -> None:
        """This step computes the tokens in these slots."""
        for slot in slots.tolist():
            self._rows[slot] = np.full(self._width, np.nan, np.float32)

    def hear(self, part: Map, slots: torch.Tensor, stream_TD: torch.Tensor) -> None:
        here = [(i, self._rows[slot]) for i, slot in enumerate(slots.tolist()) if slot in self._rows]
        if here:
            rows = torch.tensor([i for i, _ in here], device=stream_TD.device)
            for numbers, (_, row) in zip(part.read(stream_TD[rows]).cpu().numpy(), here, strict=True):
                row[part.columns] = numbers

    def take(self, slots: Slots) -> Rows:
        return np.stack([self._rows.pop(slot) for slot in slots.tolist()])


class Ear:
    """Hooks on the blocks that some table reads, and on no others."""

    def __init__(self, model: torch.nn.Module, layers: int, tables: dict[int, Table | Excerpt]) -> None:
        stack = [
            (parent, name, child)
            for parent in model.modules()
            for name, child in parent.named_children()
            if isinstance(child, torch.nn.ModuleList) and len(child) == layers
        ]
        parent, name, self.blocks = stack[0]
        names = [child for child, _ in parent.named_children()]
        self.norm = parent.get_submodule(names[names.index(name) + 1])  # what comes after the blocks
        self.layer = ""
        """The attention layer whose slot mapping is looked at; all of a group have the same."""
        self.slots = 0
        self._tables = tables
        self._hooks: list[Any] = []
        self._step: tuple[Any, torch.Tensor | None] = (None, None)

    def listen(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = [
            self._hook(layer, norm)
            for layer, norm in sorted({place for table in self._tables.values() for place in table.maps})
        ]

    def _hook(self, layer: int, norm: bool) -> Any:
        place = (layer, norm)
        if norm:
            return self.norm.register_forward_hook(lambda module, args, output: self._hear(place, (_first(output),)))
        if layer == len(self.blocks):
            return self.norm.register_forward_pre_hook(
                lambda module, args, kwargs: self._hear(place, (*args, *kwargs.values())), with_kwargs=True
            )
        if layer == 0:
            return self.blocks[0].register_forward_pre_hook(
                lambda module, args, kwargs: self._hear(place, (*args, *kwargs.values())), with_kwargs=True
            )
        return self.blocks[layer - 1].register_forward_hook(lambda module, args, output: self._hear(place, output))

    def _hear(self, place: tuple[int, bool], values: Any) -> None:
        slots = self._slots()
        if slots is None:
            return
        states = [
            v
            for v in (values if isinstance(values, tuple) else (values,))
            if isinstance(v, torch.Tensor) and v.is_floating_point()
        ]
        stream = states[0] if len(states) == 1 else states[0] + states[1]
        for table in self._tables.values():
            part = table.maps.get(place)
            if part is not None:
                table.hear(part, slots, stream[: len(slots)])

    def _slots(self) -> torch.Tensor | None:
        """The slot of each token of this step; None in a dry run."""
        context = get_forward_context()
        if context is not self._step[0]:
            mapping = context.slot_mapping.get(self.layer) if isinstance(context.slot_mapping, dict) else None
            self._step = (context, None if mapping is None else mapping.long().where(mapping >= 0, self.slots))
        return self._step[1]


def _kept(spec: SlidingWindowSpec) -> FullAttentionSpec:
    names = (
        "block_size",
        "num_kv_heads",
        "head_size",
        "head_size_v",
        "dtype",
        "kv_quant_mode",
        "page_size_padded",
        "sliding_window",
    )
    return FullAttentionSpec(**{name: getattr(spec, name) for name in names})


def _end_with(owner: int) -> None:
    """Ends vLLM's processes once the process that opened the engine is gone: killed, it cannot, and they would keep
    the device.
    """
    parent = os.getppid()
    watched = os.pidfd_open(owner)

    def wait() -> None:
        select.select([watched], [], [])
        if parent != owner:  # vLLM's engine core, between that process and this one
            os.kill(parent, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=wait, name="owner", daemon=True).start()


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]
