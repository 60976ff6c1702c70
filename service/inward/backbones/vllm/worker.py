"""vLLM's worker in its own process, with a reader on the model (``reading``); it follows which request has which
tokens of the KV cache (``tests/backbones/test_vllm.py`` pins what is depended on).

Of a ``SchedulerOutput`` the new, cached and finished requests are looked at, with their block ids. A token's slot is
``block id * block size + offset``: rows are found by slot, so the order of requests in a batch does not matter, nor
chunked prefill, preemption or padding.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from inward.backbones.vllm.internals import FullAttentionSpec, SlidingWindowSpec, Worker, current_platform
from inward.backbones.vllm.protocol import EXTRA_ARG, OWNER, TABLE_COLUMNS, TableColumns, WidePart, Wish
from inward.backbones.vllm.reading import ResidualReader, Slots, TableRows, WideRows

KEPT_TOKENS = 1024
"""On a GPU: of a step that keeps its states until it ends; at least as many as vLLM captures graphs for."""

if current_platform.is_cpu():
    from inward.backbones.vllm import cpu_lora

    class RewindingGenerator(torch.Generator):
        """For a seeded request whose prompt comes in chunks vLLM rewinds the generator after each chunk, by an offset
        that CPU generators don't have: the engine would die of it. Nothing has been drawn by then, so back to the seed
        is the same.
        """

        def get_offset(self) -> int:
            return 4  # vLLM takes 4 off for one draw

        def set_offset(self, offset: int) -> torch.Generator:
            return self.manual_seed(self.initial_seed())

    torch.Generator = RewindingGenerator  # type: ignore[misc]
    cpu_lora.install()


class ReadingWorker(Worker):  # type: ignore[misc]
    """vLLM's worker that also reads. Methods named ``inward_…`` are called through ``collective_rpc``. Under tensor
    parallelism every rank has the whole residual stream, and the first one reads it.
    """

    _reader: ResidualReader | None = None
    _aside: torch.cuda.Stream | None = None
    """On which readouts leave a GPU."""
    _gathered: torch.cuda.Event
    """When rows were gathered last between two steps."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        _end_with(int(os.environ[OWNER]))
        super().load_model(*args, **kwargs)
        self._requests = RequestTable()
        if current_platform.is_cuda():
            self._aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._gathered = torch.cuda.Event()  # type: ignore[no-untyped-call]
        if self.rank == 0:
            self._reader = ResidualReader(
                self.model_runner.get_model(),
                self.model_config.hf_text_config.num_hidden_layers,
                int(self.model_config.get_hidden_size()),
                tokens=self.scheduler_config.max_num_batched_tokens,
                kept=KEPT_TOKENS if current_platform.is_cuda() else 0,
                dtype=self.model_config.dtype,
                device=self.device,
            )

    def get_kv_cache_spec(self) -> dict[str, Any]:
        """Where all layers have a sliding window vLLM forgets the tokens that it has left, and their rows would go with
        them. So they are kept, as vLLM itself keeps them where only some layers have one; attention computes the same.
        """
        specs: dict[str, Any] = super().get_kv_cache_spec()
        if all(isinstance(spec, SlidingWindowSpec) for spec in specs.values()):
            return {name: _kept(spec) for name, spec in specs.items()}
        return specs

    def determine_available_memory(self) -> int:
        """What is left for the KV cache when its tokens' rows of the table have their share."""
        available = int(super().determine_available_memory())
        cached = sum(spec.page_size_bytes / spec.block_size for spec in self.get_kv_cache_spec().values())
        return int(available * cached / (cached + 4 * TABLE_COLUMNS)) if cached else available

    def initialize_from_config(self, *args: Any, **kwargs: Any) -> None:
        super().initialize_from_config(*args, **kwargs)
        config = self.model_runner.kv_cache_config
        group = config.kv_cache_groups[0]
        if self._reader is not None and self._one_cache(config.kv_cache_groups):
            self._requests.block_size = group.kv_cache_spec.block_size
            with self._cache_memory():
                self._reader.open_table(config.num_blocks * self._requests.block_size, group.layer_names[0])

    def execute_model(self, scheduler_output: Any) -> Any:
        if self._reader is None:
            return super().execute_model(scheduler_output)
        self._follow(scheduler_output)
        output = super().execute_model(scheduler_output)
        self._reader.finish_step(scheduler_output.total_num_scheduled_tokens)
        return output

    def sleep(self, level: int = 1) -> None:
        """What was read goes with the keys and values, which vLLM drops: on a GPU their memory, at an address that
        graphs know.
        """
        super().sleep(level)
        if self._reader is not None and current_platform.is_cpu():
            self._reader.close_table()

    def wake_up(self, tags: Any = None) -> None:
        """A new table for new keys and values."""
        super().wake_up(tags)
        if self._reader is not None and current_platform.is_cpu():
            self._reader.reopen_table()
        elif self._reader is not None:
            self._reader.clear_table()

    def _cache_memory(self) -> AbstractContextManager[Any]:
        """Memory that vLLM gives away while it sleeps, if it does."""
        pool = getattr(self, "_maybe_get_memory_pool_context", None)
        return pool(tag="kv_cache") if pool is not None else nullcontext()

    def _follow(self, scheduler_output: Any) -> None:
        finished = self._requests.finished(scheduler_output.finished_req_ids)
        for request in finished:
            self._gather(request)  # before this step may write to the slots that the request has left
        if finished and self._aside is not None:
            self._gathered.record()
        for request, since in self._requests.note(scheduler_output):
            rows = self._reader.rows(request.wish.wide) if request.wish.wide and self._reader else None
            if isinstance(rows, WideRows):
                rows.expect(request.slots(self._requests.block_size, since))

    def inward_install(self, parts: Sequence[Sequence[Any]], live: Sequence[int]) -> None:
        """New weights, as ``protocol.TableColumns``, and all columns that somebody has."""
        if self._reader is not None:
            self._check_caches()
            self._reader.install([TableColumns(*part) for part in parts], live)

    def inward_install_wide(self, number: int, width: int, parts: Sequence[Sequence[Any]]) -> None:
        """A layout of rows of its own, as ``protocol.WidePart``."""
        if self._reader is not None:
            self._check_caches()
            self._reader.install_wide(number, width, [WidePart(*part) for part in parts])

    @torch.inference_mode()
    def inward_take(
        self, keys: Sequence[str], columns: Sequence[int], forget: Sequence[str], retire: Sequence[int]
    ) -> tuple[bytes, list[int]]:
        """These columns of the rows of finished requests: float32, one request after the other, and how many rows each
        has. Nothing is kept of the requests ``forget`` and the wide layouts ``retire``.
        """
        if self._reader is None:
            return b"", []
        for key in forget:
            self._requests.forget(key)
        self._reader.retire(retire)
        with self._beside_steps():
            for request in self._requests.ending(keys):  # no step has written to their slots since they ended
                self._gather(request)
            rows = [self._requests.gathered.pop(key) for key in keys]
            return self._handed_out(rows, columns) if rows else b"", [len(part) for part in rows]

    @torch.inference_mode()
    def inward_peek(self, keys: Sequence[str], since: Sequence[int], columns: Sequence[int]) -> tuple[bytes, list[int]]:
        """These columns of what has been read so far of requests that may still run, each from its row ``since`` on;
        nothing of one that waits. Rows stay where they are.
        """
        if self._reader is None:
            return b"", []
        rows = [self._requests.so_far(key, start, self._reader) for key, start in zip(keys, since, strict=True)]
        return self._handed_out(rows, columns), [len(part) for part in rows]

    def inward_norm(self, states: bytes) -> bytes:
        """The final norm of float32 states ``[N, D]``: what position ``final_norm`` must read if the states are
        those of the last layer.
        """
        if self._reader is None:
            return b""
        width = int(self.model_config.get_hidden_size())
        rows = torch.from_numpy(np.frombuffer(states, np.float32).copy()).view(-1, width)
        with torch.inference_mode():
            normed = self._reader.norm_forward(rows.to(self.device, self.model_config.dtype))
        normed = normed[0] if isinstance(normed, tuple) else normed
        return bytes(normed.float().cpu().numpy().tobytes())

    def inward_held(self) -> tuple[int, int, int]:
        """Requests followed, gathered and not yet taken; wide layouts. For tests: without requests in flight it is (0,
        0, …).
        """
        return len(self._requests.requests), len(self._requests.gathered), self._reader.layouts if self._reader else 0

    @contextmanager
    def _beside_steps(self) -> Iterator[None]:
        """On a GPU: on a stream of its own, which does not wait for steps that are on their way. What it may use are
        tokens of requests that have ended, so their steps are over, and what was gathered before it began.
        """
        if self._aside is None:
            yield
            return
        self._aside.wait_event(self._gathered)
        with torch.cuda.stream(self._aside):
            yield

    @staticmethod
    def _handed_out(rows: Sequence[torch.Tensor], columns: Sequence[int]) -> bytes:
        together = torch.cat(list(rows))
        chosen = torch.tensor(columns, dtype=torch.int64, device=together.device)
        return bytes(together.index_select(1, chosen).cpu().numpy().tobytes())

    def _gather(self, request: Request) -> None:
        rows = self._reader.rows(request.wish.wide) if self._reader is not None else None
        if rows is not None:
            self._requests.gathered[request.wish.key] = rows.take(request.slots(self._requests.block_size))

    @staticmethod
    def _one_cache(groups: Sequence[Any]) -> bool:
        return len(groups) == 1 and isinstance(groups[0].kv_cache_spec, FullAttentionSpec)

    def _check_caches(self) -> None:
        if not self._one_cache(self.model_runner.kv_cache_config.kv_cache_groups):
            raise NotImplementedError(
                "the model does not keep all of its tokens in one kind of cache (recurrent layers, or windows of "
                "several sizes)"
            )


@dataclass(slots=True)
class Request:
    """A request whose rows somebody wants."""

    wish: Wish
    blocks: list[int]
    computed: int
    """Tokens that are, or after this step will be, in the cache."""

    def slots(self, block_size: int, since: int = 0) -> Slots:
        """Of the tokens from where it is wanted, or ``since``, on."""
        positions = np.arange(max(self.wish.start, since), self.computed)
        return np.asarray(
            np.asarray(self.blocks, dtype=np.int64)[positions // block_size] * block_size + positions % block_size
        )


@dataclass(slots=True)
class RequestTable:
    """Which blocks the wanted requests hold, by what the scheduler tells each step."""

    block_size: int = 0
    requests: dict[str, Request] = field(default_factory=dict)
    gathered: dict[str, torch.Tensor] = field(default_factory=dict)
    stepped: set[str] = field(default_factory=set)
    """Keys of those in the last step: their tokens are in the cache; one that was preempted has lost them."""

    def note(self, step: Any) -> list[tuple[Request, int]]:
        """Takes in a ``SchedulerOutput``; gives its wanted requests, and how many tokens each had before.

        A session that goes on comes as a new request with the same id, and so does, in some runners, one that was
        preempted.
        """
        stepping: list[tuple[Request, int]] = []
        for new in step.scheduled_new_reqs:
            wish = ((new.sampling_params and new.sampling_params.extra_args) or {}).get(EXTRA_ARG)
            if wish:
                computed = new.num_computed_tokens + step.num_scheduled_tokens[new.req_id]
                self.requests[new.req_id] = Request(Wish(*wish), list(new.block_ids[0]), computed)
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
        self.stepped = {request.wish.key for request, _ in stepping}
        return stepping

    def so_far(self, key: str, start: int, reader: ResidualReader) -> torch.Tensor:
        """Rows of one request from ``start`` on, as far as they are there."""
        if key in self.gathered:
            return self.gathered[key][start:]
        request = next((one for one in self.requests.values() if one.wish.key == key), None)
        rows = reader.rows(0)
        if not isinstance(rows, TableRows) or request is None or key not in self.stepped:
            return torch.zeros((0, TABLE_COLUMNS), device=reader.device)
        return rows.take(request.slots(self.block_size, request.wish.start + start))

    def finished(self, ids: set[str]) -> list[Request]:
        """These requests, which have ended."""
        return [self.requests.pop(req_id) for req_id in ids if req_id in self.requests]

    def ending(self, keys: Sequence[str]) -> list[Request]:
        """Requests that have ended, which the next step will say."""
        wanted = set(keys)
        return self.finished({req_id for req_id, request in self.requests.items() if request.wish.key in wanted})

    def forget(self, key: str) -> None:
        """Nobody wants its rows any more."""
        self.gathered.pop(key, None)
        self.ending([key])


def _kept(spec: Any) -> Any:
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
    return FullAttentionSpec(**{name: getattr(spec, name) for name in names if hasattr(spec, name)})


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
