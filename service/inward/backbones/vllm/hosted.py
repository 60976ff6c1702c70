"""Somebody else's ``vllm serve``: what the arguments of its engine must be, so that it can be read.

What is changed of it: the worker is the one that reads, which keeps a row of numbers beside each cached token. Whatever
vLLM computes and answers is as before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec
from typing import Any

from inward.backbones.vllm.internals import EngineArgs, UsageContext
from inward.backbones.vllm.options import OURS, REFUSED
from inward.backbones.vllm.protocol import READING, WORKER
from inward.errors import SetupError

CONFIGURE = "create_engine_config"
"""The method of ``EngineArgs`` after which nothing of an engine changes any more."""
PARALLEL = {
    "pipeline_parallel_size": "pipeline_parallel",
    "data_parallel_size": "data_parallel",
    "prefill_context_parallel_size": "context_parallel",
    "decode_context_parallel_size": "context_parallel",
}
"""Of vLLM's ``ParallelConfig`` what must be 1, and the key of the reason."""
NOT_BESIDE = ("worker_cls", "worker_extension_cls", "hf_overrides")
"""Of ``OURS`` what would change what is read; the rest a server's own options say, or ``refuse`` looks at."""
PREPARED = "prepared_by_inward"
"""Set on our ``create_engine_config``, and kept by whoever wraps it with ``functools.wraps``."""


def prepare(check: Callable[[str, str | None], object]) -> None:
    """From now on engines of this process that answer OpenAI's routes are made so that they can be read; repeated
    calls change nothing.

    Args:
        check: is given the model and its revision before anything is loaded, and raises what is wrong with the heads.
    """
    configure = getattr(EngineArgs, CONFIGURE)
    if hasattr(configure, PREPARED):
        return

    @wraps(configure)
    def configured(arguments: Any, usage_context: Any = None, *args: Any, **kwargs: Any) -> Any:
        if usage_context != UsageContext.OPENAI_API_SERVER or arguments.worker_cls == WORKER:
            return configure(arguments, usage_context, *args, **kwargs)
        _adapt(arguments)
        config = configure(arguments, usage_context, *args, **kwargs)
        refuse(config)
        check(config.model_config.model, config.model_config.revision)
        return config

    setattr(configured, PREPARED, True)
    setattr(EngineArgs, CONFIGURE, configured)


def _adapt(arguments: Any) -> None:
    """Asks for the worker that reads.

    Raises:
        SetupError: an argument would change what is read, or this vLLM takes no routes.
    """
    if find_spec("vllm.plugins.endpoint_plugins") is None:
        raise SetupError(
            "this vLLM has no vllm.endpoint_plugins, by which Inward adds its routes: take a newer one, or serve the "
            "model with `inward serve --backbone vllm`"
        )
    for name in NOT_BESIDE:
        if getattr(arguments, name) not in ("auto", "", None, {}):
            raise SetupError(f"--{name.replace('_', '-')} can't be set beside Inward's plugin: {OURS[name]}")
    arguments.worker_cls = WORKER
    arguments.additional_config = {**(arguments.additional_config or {}), **READING}
    if arguments.disable_hybrid_kv_cache_manager is None:  # tokens that a sliding window has left stay, and their rows
        arguments.disable_hybrid_kv_cache_manager = True


def refuse(config: Any) -> None:
    """Raises SetupError where an engine of this ``VllmConfig`` can't be read."""
    parallel = config.parallel_config
    reasons = {name: REFUSED[why] for name, why in PARALLEL.items() if getattr(parallel, name, 1) > 1}
    if getattr(parallel, "enable_dbo", False):
        reasons["enable_dbo"] = REFUSED["dbo"]
    if getattr(parallel, "_api_process_count", 1) > 1:
        reasons["api_server_count"] = "each front end would give the same rows of the one table to its own heads"
    if config.speculative_config is not None:
        reasons["speculative_config"] = REFUSED["spec"]
    if config.kv_transfer_config is not None:
        reasons["kv_transfer_config"] = REFUSED["kv_transfer"]
    if getattr(config.cache_config, "kv_offloading_size", None):
        reasons["kv_offloading_size"] = REFUSED["kv_offloading"]
    if config.model_config.runner_type != "generate":
        reasons["runner"] = "heads read a model that generates"
    if reasons:
        told = "; ".join(f"--{name.replace('_', '-')}: {reason}" for name, reason in reasons.items())
        raise SetupError(f"Inward's plugin can't read this engine. {told}")
