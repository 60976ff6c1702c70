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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from inward.backbones.vllm.internals import FullAttentionSpec, SlidingWindowSpec, Worker, current_platform
from inward.backbones.vllm.protocol import EXTRA_ARG, OWNER, TABLE_COLUMNS, TableColumns, WidePart, Wish
from inward.backbones.vllm.reading import ResidualReader, Slots, TableRows, WideRows

KEPT_TOKENS = 1024
"""On a GPU: of a step that keeps its states until it ends, as every step that is captured does."""

POOL = "inward"
"""Of vLLM's allocator: where the table is."""

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
    _stepped: torch.cuda.Event
    """The end of the last step."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        if owner := os.environ.get(OWNER):  # none where the engine is somebody else's
            _end_with(int(owner))
        super().load_model(*args, **kwargs)
        self._requests = RequestTable()
        if current_platform.is_cuda():
            self._aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._gathered, self._stepped = torch.cuda.Event(), torch.cuda.Event()  # type: ignore[no-untyped-call]
        if self.rank == 0:
            self._reader = ResidualReader(
                self.model_runner.get_model(),
                self.model_config.hf_text_config.num_hidden_layers,
                int(self.model_config.get_hidden_size()),
                tokens=self.scheduler_config.max_num_batched_tokens,
                kept=max(KEPT_TOKENS, self._captured_tokens()) if current_platform.is_cuda() else 0,
                dtype=self.model_config.dtype,
                device=self.device,
            )

    def _captured_tokens(self) -> int:
        """Of the largest step that is captured."""
        return int(getattr(self.vllm_config.compilation_config, "max_cudagraph_capture_size", 0) or 0)

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
        if self._aside is not None:
            self._stepped.record()
        return output

    def sleep(self, level: int = 1) -> None:
        """What was read goes with the keys and values, which vLLM drops: on a GPU their memory, but not its address,
        which graphs know.
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
        """Memory that vLLM gives away while it sleeps, if it does. A pool of its own: opened twice, one loses what it
        had.
        """
        pool = getattr(self, "_maybe_get_memory_pool_context", None)
        return pool(tag=POOL) if pool is not None else nullcontext()

    def _follow(self, scheduler_output: Any) -> None:
        reader = self._reader
        assert reader is not None
        # before this step may write to the slots that they have left
        if self._requests.gather(scheduler_output.finished_req_ids, reader) and self._aside is not None:
            self._gathered.record()
        for req_id in self._requests.note(scheduler_output):
            rows = reader.rows(self._requests.requests[req_id].wish.wide)
            if isinstance(rows, WideRows):
                rows.expect(self._requests.new_slots(req_id))

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
        self, wanted: Sequence[tuple[Sequence[str], Sequence[int]]], forget: Sequence[str], retire: Sequence[int]
    ) -> list[tuple[bytes, list[int]]]:
        """For each list of keys of finished requests these columns of their rows: float32, one request after the
        other, and how many rows each has. Nothing is kept of the requests ``forget`` and the wide layouts ``retire``.
        """
        if self._reader is None:
            return [(b"", []) for _ in wanted]
        for key in forget:
            self._requests.forget(key)
        self._reader.retire(retire)
        # no step has written to their slots since they ended
        ended = self._requests.ids(key for keys, _ in wanted for key in keys)
        with self._beside_steps(ended):
            self._requests.gather(ended, self._reader)
            answers = []
            for keys, columns in wanted:
                rows = [self._requests.gathered.pop(key) for key in keys]
                answers.append((self._handed_out(rows, columns) if rows else b"", [len(part) for part in rows]))
            return answers

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
    def _beside_steps(self, ended: Sequence[str]) -> Iterator[None]:
        """On a GPU: on a stream of its own, which waits for nothing but what was gathered before it began and, if
        one of these requests was in it, for the last step.
        """
        if self._aside is None:
            yield
            return
        self._aside.wait_event(self._gathered)
        if any(req_id in self._requests.current for req_id in ended):
            self._aside.wait_event(self._stepped)
        with torch.cuda.stream(self._aside):
            yield

    @staticmethod
    def _handed_out(rows: Sequence[torch.Tensor], columns: Sequence[int]) -> bytes:
        together = torch.cat(list(rows))
        chosen = torch.tensor(columns, dtype=torch.int64, device=together.device)
        return bytes(together.index_select(1, chosen).cpu().numpy().tobytes())

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


@dataclass(slots=True)
class RequestTable:
    """Which blocks the wanted requests hold, by what the scheduler tells each step.

    A step may have a thousand requests and take a few milliseconds, so nothing is done for each of them in each step
    but what dictionaries do by themselves.
    """

    block_size: int = 0
    requests: dict[str, Request] = field(default_factory=dict)
    gathered: dict[str, torch.Tensor] = field(default_factory=dict)
    current: Mapping[str, int] = field(default_factory=dict)
    """Requests of the last step, and their tokens in it. Only theirs are surely in the cache: one that was preempted
    has lost its own."""
    _ids: dict[str, str] = field(default_factory=dict)
    """Of requests, by key."""
    _computed: dict[str, int] = field(default_factory=dict)
    """Tokens in the cache before the last step that each was in."""
    _scheduled: dict[str, int] = field(default_factory=dict)
    """Tokens of that step."""
    _wide: set[str] = field(default_factory=set)

    def note(self, step: Any) -> list[str]:
        """Takes in a ``SchedulerOutput``; gives its requests with wide rows.

        A session that goes on comes as a new request with the same id, and so does, in some runners, one that was
        preempted.
        """
        for req_id in getattr(step, "preempted_req_ids", None) or ():
            if req_id in self.requests:  # its blocks are another's now, also where it has ended in the step before
                self.requests[req_id].blocks = []
                self._computed[req_id] = self._scheduled[req_id] = 0
        for new in step.scheduled_new_reqs:
            self._computed[new.req_id] = new.num_computed_tokens
            wish = ((new.sampling_params and new.sampling_params.extra_args) or {}).get(EXTRA_ARG)
            if wish:
                request = self.requests[new.req_id] = Request(Wish(*wish), list(new.block_ids[0]))
                self._ids[request.wish.key] = new.req_id
                if request.wish.wide:
                    self._wide.add(new.req_id)
        cached = step.scheduled_cached_reqs
        for req_id in cached.resumed_req_ids:
            if req_id in self.requests:
                self.requests[req_id].blocks = []
        for req_id, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if blocks and req_id in self.requests:
                self.requests[req_id].blocks += blocks[0]
        self._computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        self._scheduled.update(step.num_scheduled_tokens)
        self.current = step.num_scheduled_tokens
        return [req_id for req_id in self._wide if req_id in self.current]

    def slots(self, req_id: str, since: int = 0) -> Slots:
        """Of a request's tokens from where it is wanted, or ``since``, on."""
        request = self.requests[req_id]
        stop = self._computed[req_id] + self._scheduled[req_id]
        positions = np.arange(max(request.wish.start, since), stop)
        blocks = np.asarray(request.blocks, dtype=np.int64)[positions // self.block_size]
        return np.asarray(blocks * self.block_size + positions % self.block_size)

    def new_slots(self, req_id: str) -> Slots:
        """Of those that the last step computed."""
        return self.slots(req_id, self._computed[req_id])

    def so_far(self, key: str, start: int, reader: ResidualReader) -> torch.Tensor:
        """Rows of one request from ``start`` on, as far as they are there."""
        if key in self.gathered:
            return self.gathered[key][start:]
        req_id, rows = self._ids.get(key), reader.rows(0)
        if not isinstance(rows, TableRows) or req_id is None or req_id not in self.current:
            return torch.zeros((0, TABLE_COLUMNS), device=reader.device)
        return rows.take(self.slots(req_id, self.requests[req_id].wish.start + start))

    def gather(self, ids: Iterable[str], reader: ResidualReader) -> bool:
        """Keeps the rows of these requests, which have ended, if they are wanted, and forgets the requests. Gives
        whether there were any.
        """
        ended = [req_id for req_id in ids if req_id in self.requests]
        for wide in {self.requests[req_id].wish.wide for req_id in ended}:
            alike = [req_id for req_id in ended if self.requests[req_id].wish.wide == wide]
            slots = [self.slots(req_id) for req_id in alike]
            if (rows := reader.rows(wide)) is not None:
                parts = torch.split(rows.take(np.concatenate(slots)), [len(own) for own in slots])
                keys = (self.requests[req_id].wish.key for req_id in alike)
                self.gathered.update(zip(keys, parts, strict=True))
        self.drop(ids)
        return bool(ended)

    def ids(self, keys: Iterable[str]) -> list[str]:
        """Of the requests that are still followed under these keys."""
        return [self._ids[key] for key in keys if key in self._ids]

    def drop(self, ids: Iterable[str]) -> None:
        """Nothing is known of these requests any more."""
        for req_id in ids:
            self._wide.discard(req_id)
            self._computed.pop(req_id, None)
            self._scheduled.pop(req_id, None)
            request = self.requests.pop(req_id, None)
            if request is not None and self._ids.get(request.wish.key) == req_id:
                del self._ids[request.wish.key]

    def forget(self, key: str) -> None:
        """Nobody wants its rows any more."""
        self.gathered.pop(key, None)
        for req_id in self.ids([key]):
            self.requests.pop(req_id)
            self._wide.discard(req_id)
            del self._ids[key]


def _kept(spec: Any) -> Any:
    names = "block_size num_kv_heads head_size head_size_v dtype kv_quant_mode page_size_padded sliding_window"
    return FullAttentionSpec(**{name: getattr(spec, name) for name in names.split() if hasattr(spec, name)})


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
