"""vLLM's async engine on a thread and event loop of its own, so that its output processing and the HTTP side do not
hold each other up.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from inward.backbones.base import asleep
from inward.backbones.cpus import CHOSEN, available_cpus, cpu_quota
from inward.backbones.vllm.internals import (
    AsyncEngineArgs,
    AsyncLLM,
    ClientError,
    EngineDeadError,
    LoRARequest,
    SamplingParams,
    current_platform,
)
from inward.backbones.vllm.options import checked
from inward.backbones.vllm.protocol import OWNER, READING, WORKER
from inward.errors import Conflict, EngineDead, InvalidField, SetupError

T = TypeVar("T")
SHUTDOWN_TIMEOUT_S = 30.0
"""For vLLM's processes to end before they are killed."""
POLL_INTERVAL_S = 0.25
"""Between two looks at whether the engine that a call waits for is still alive."""
CPU_CACHE_BYTES = 2**30
"""KV cache on a CPU, where vLLM would otherwise take most of the machine's memory."""
START_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
"""Environment variable of vLLM's: how its processes are started."""
CPU_BINDING = "VLLM_CPU_OMP_THREADS_BIND"
"""Environment variable of vLLM's: which processors its threads are bound to."""


class Engine:
    """vLLM's engine. ``call`` brings work from any event loop to the engine's own; the other methods are awaited
    there.
    """

    config: Any
    """vLLM's resolved configuration."""
    _llm: AsyncLLM | None
    _loop: asyncio.AbstractEventLoop

    def __init__(
        self, folder: Path, dtype: str, options: Mapping[str, Any], *, trust_remote_code: bool = False
    ) -> None:
        """Loads the model, which takes a while.

        Args:
            folder: of a Hugging Face model.
            options: vLLM's own engine arguments, by their names.

        Raises:
            SetupError: vLLM refuses the model or an option, or one that reading needs is set otherwise.
        """
        arguments = _arguments(folder, dtype, options) | {"trust_remote_code": trust_remote_code}
        _follow_quota()
        if current_platform.is_cuda():
            # whoever has asked torch for a GPU must not be forked, and choosing a dtype or converting a file asks it
            os.environ.setdefault(START_METHOD, "spawn")
        os.environ[OWNER] = str(os.getpid())
        self._begin(asyncio.new_event_loop())
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        try:
            self._llm = asyncio.run_coroutine_threadsafe(self._open(arguments), self._loop).result()
        except BaseException as error:
            self._stop()
            if isinstance(error, Exception):
                raise SetupError(f"vLLM cannot serve the model in {folder}: {error}") from error
            raise
        self.config = self._llm.vllm_config

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        self.error: str | None = None
        self.asleep = self._sleeps = False  # what is asleep or about to be takes no calls
        self._llm, self._loop = None, loop
        self._switching = asyncio.Lock()
        self._ids = (f"inward-{number}" for number in itertools.count())
        self._tasks: set[asyncio.Future[Any]] = set()

    @property
    def compiled(self) -> bool:
        """Whether the model is compiled, not run as it is written."""
        return not self.config.model_config.enforce_eager and bool(self.config.compilation_config.mode)

    async def _open(self, arguments: dict[str, Any]) -> AsyncLLM:
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))

    @property
    def dead(self) -> str | None:
        """Why nothing can be computed any more."""
        return self.error or ("vLLM's engine process ended" if self._alive.errored else None)

    @property
    def _alive(self) -> AsyncLLM:
        if self._llm is None:
            raise EngineDead(f"the backbone cannot compute any more: {self.error}")
        return self._llm

    async def call(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Runs ``work`` on the engine's loop. Cancelling the caller cancels it there.

        Raises:
            EngineDead: the engine has died, or was closed.
        """
        if self.dead:
            raise EngineDead(f"the backbone cannot compute any more: {self.dead}")
        if self.asleep:
            raise asleep()
        future = asyncio.run_coroutine_threadsafe(self._translated(work), self._loop)
        return await asyncio.wrap_future(future)

    async def sleep(self) -> None:
        """Gives the device's memory away: weights wait in main memory, keys, values and what was read are dropped.
        Calls in flight finish first.

        Raises:
            Conflict: it was not opened for that.
        """
        on_cpu = current_platform.is_cpu()  # there only the table of readouts is given back
        if not (on_cpu or self.config.model_config.enable_sleep_mode):
            raise Conflict("vLLM sleeps only if it was opened for it: --vllm-options '{\"enable_sleep_mode\": true}'")
        await self._switch(lambda llm: llm.sleep(level=1), asleep=True)

    async def wake(self) -> None:
        """Computes again."""
        if self.asleep:
            await self._switch(lambda llm: llm.wake_up(), asleep=False)

    async def _switch(self, switch: Callable[[AsyncLLM], Coroutine[Any, Any, Any]], *, asleep: bool) -> None:
        """Nothing new begins from now on, and what is under way ends first, even if the caller leaves meanwhile."""

        async def alone() -> None:
            async with self._switching:
                self.asleep = True  # a switch that ended meanwhile may have let calls in
                try:
                    if self._sleeps != asleep:
                        if others := self._tasks - {asyncio.current_task()}:
                            await asyncio.wait(others)
                        await self._answer(switch(self._alive))
                        self._sleeps = asleep
                finally:
                    self.asleep = self._sleeps

        if self.dead:
            raise EngineDead(f"the backbone cannot compute any more: {self.dead}")
        self.asleep = True
        await asyncio.shield(asyncio.wrap_future(asyncio.run_coroutine_threadsafe(alone(), self._loop)))

    def wait(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """``call``, for a thread that has nothing else to do."""
        return asyncio.run_coroutine_threadsafe(self._translated(work), self._loop).result()

    async def _translated(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            return await work()
        except EngineDeadError as error:
            raise EngineDead(f"the backbone cannot compute any more: {self.dead or error}") from error
        except ClientError as error:
            raise InvalidField(f"vLLM refuses the request: {error}") from error
        finally:
            self._tasks.discard(task)

    async def generate(
        self, prompt: Any, params: SamplingParams, lora: LoRARequest | None
    ) -> AsyncGenerator[Any, None]:
        """vLLM's outputs of one request; leaving early aborts it."""
        async for output in self._alive.generate(prompt, params, next(self._ids), lora_request=lora):
            yield output

    async def final(self, prompt: Any, params: SamplingParams, lora: LoRARequest | None) -> Any:
        """The last output of one request."""
        return [output async for output in self.generate(prompt, params, lora)][-1]

    async def add_lora(self, lora: LoRARequest) -> None:
        """Loads an adapter, so that it is known to be good before a request needs it.

        Raises:
            InvalidField: vLLM refuses it.
        """
        try:
            await self._answer(self._alive.add_lora(lora))
        except (EngineDeadError, EngineDead):
            raise
        except Exception as error:  # whatever was raised in vLLM's process comes as one kind
            raise InvalidField(f"vLLM refuses the adapter: {error}", param="version") from error

    async def rpc(self, method: str, *args: Any) -> Any:
        """Calls a method of ``ReadingWorker`` between two steps; the answer of the first rank."""
        return (await self._answer(self._alive.collective_rpc(method, args=args)))[0]

    async def _answer(self, call: Coroutine[Any, Any, T]) -> T:
        """What a call of one of vLLM's own methods gives. vLLM leaves those unanswered when its engine dies;
        requests it answers.
        """
        task = asyncio.ensure_future(call)
        try:
            while not (await asyncio.wait({task}, timeout=POLL_INTERVAL_S))[0]:
                if self.dead:
                    raise EngineDead(f"the backbone cannot compute any more: {self.dead}")
            return task.result()
        finally:
            task.cancel()

    async def close(self) -> None:
        """Waits for calls in flight, then ends vLLM's processes."""
        self.error = self.error or "it was closed"
        await asyncio.to_thread(self.shut)

    def shut(self) -> None:
        """``close``, for a thread that has nothing else to do."""
        self.error = self.error or "it was closed"
        if self._llm is None:
            return

        async def rest() -> None:
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._alive.shutdown(timeout=SHUTDOWN_TIMEOUT_S)
            self._llm = None

        asyncio.run_coroutine_threadsafe(rest(), self._loop).result()
        self._stop()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class HostedEngine(Engine):
    """The engine of somebody else's server, on the event loop where that awaits it. Its end is theirs to decide.

    Args:
        llm: their ``AsyncLLM``.
    """

    def __init__(self, llm: AsyncLLM) -> None:
        self._begin(asyncio.get_running_loop())
        self._llm = llm
        self.config = llm.vllm_config

    def shut(self) -> None:
        """Nothing more is asked of it."""
        self.error = self.error or "it was closed"


def built_for(device: str) -> torch.device:
    """The kind of device that this vLLM runs on.

    Raises:
        SetupError: ``device`` is another.
    """
    kind = str(current_platform.device_type)
    if device not in ("auto", kind):
        raise SetupError(
            f"this vLLM is built for {kind}, not for {device}: take --device auto, or --backbone transformers"
        )
    return torch.device(kind)


def _arguments(folder: Path, dtype: str, options: Mapping[str, Any]) -> dict[str, Any]:
    options = checked(options)
    cpu = {"kv_cache_memory_bytes": CPU_CACHE_BYTES, "block_size": 32, "enforce_eager": False}
    # tokens that a sliding window has left stay in the cache, and their readouts
    kept = {"disable_hybrid_kv_cache_manager": True}
    defaults = {
        "disable_log_stats": True,
        "enable_prefix_caching": True,
        "generation_config": "vllm",
        **kept,
        **(cpu if current_platform.is_cpu() else {}),
    }
    fixed = {"model": str(folder), "dtype": dtype, "worker_cls": WORKER, "additional_config": READING}
    return defaults | options | fixed


def _follow_quota() -> None:
    """vLLM binds a thread to every processor that the scheduler allows. Where a control group allows less time than
    that, they would wait for each other: then as many as it allows run unbound.
    """
    if current_platform.is_cpu() and CPU_BINDING not in os.environ and CHOSEN not in os.environ:
        quota = cpu_quota()
        if quota is not None and available_cpus() <= quota < len(os.sched_getaffinity(0)):
            os.environ[CPU_BINDING], os.environ[CHOSEN] = "nobind", str(available_cpus())
