"""vLLM's engine arguments that a user may set, and why some may not be."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from inward.errors import SetupError

ALLOWED = frozenset(
    "tensor_parallel_size distributed_executor_backend disable_custom_all_reduce enable_expert_parallel "
    "max_model_len max_num_batched_tokens max_num_seqs max_num_scheduled_tokens long_prefill_token_threshold "
    "enable_chunked_prefill enable_prefix_caching prefix_caching_hash_algo scheduling_policy "
    "gpu_memory_utilization kv_cache_memory_bytes kv_cache_dtype calculate_kv_scales block_size swap_space "
    "cpu_offload_gb quantization quantization_config load_format model_loader_extra_config ignore_patterns "
    "max_parallel_loading_workers use_tqdm_on_load safetensors_load_strategy model_impl enforce_eager "
    "optimization_level attention_backend attention_config moe_backend linear_backend kernel_config "
    "disable_cascade_attn disable_hybrid_kv_cache_manager seed "
    "enable_lora max_loras max_lora_rank max_cpu_loras lora_dtype fully_sharded_loras "
    "limit_mm_per_prompt language_model_only skip_mm_profiling mm_processor_cache_gb "
    "disable_log_stats show_hidden_metrics_for_version enable_sleep_mode numa_bind numa_bind_nodes "
    "numa_bind_cpus".split()
)
REFUSED = {
    "data_parallel": "each copy of the model would keep readouts of its own requests only; run one worker for each",
    "context_parallel": "a rank sees only a part of a text's tokens",
    "pipeline_parallel": "a stage sees only its own layers; use tensor_parallel_size",
    "dbo": "dual-batch overlap cuts a step in two, whose tokens can't be told apart",
    "ubatch": "dual-batch overlap cuts a step in two, whose tokens can't be told apart",
    "spec": "speculative decoding computes tokens that are thrown away again, in the places of those that stay",
    "kv_transfer": "keys and values that come from elsewhere bring no readouts along",
    "kv_offloading": "keys and values that come back from elsewhere bring no readouts along",
    "compilation": "reading has to be a part of what is compiled; enforce_eager turns compilation off",
    "cudagraph": "reading has to be a part of what is captured",
    "generation_config": "requests say how they are sampled",
}
"""Parts of names, and the reason."""
OURS = {
    "model": "the service sets it (--model)",
    "dtype": "the service sets it (--dtype)",
    "trust_remote_code": "the service sets it (--trust-remote-code)",
    "worker_cls": "the service's own worker reads the states",
    "worker_extension_cls": "the service's own worker reads the states",
    "additional_config": "the service tells its own worker by it",
    "hf_overrides": "heads are fitted on the model as it is saved; change its config.json",
    "runner": "the service needs an engine that generates",
    "convert": "the service needs an engine that generates",
}
"""Whole names, and the reason."""


def checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, if all of them may be set.

    Raises:
        SetupError: one may not be, and why, or vLLM has none of this name.
    """
    for name, value in options.items():
        if name in ALLOWED:
            continue
        if name == "pipeline_parallel_size" and value == 1:
            continue
        reason = OURS.get(name) or next((why for part, why in REFUSED.items() if part in name), None)
        if reason is not None:
            raise SetupError(f"vllm_options.{name} can't be set: {reason}")
        close = get_close_matches(name, ALLOWED, 1)
        hint = f"did you mean {close[0]}?" if close else f"those are: {', '.join(sorted(ALLOWED))}"
        raise SetupError(f"vllm_options.{name} is none of the options that are passed on to vLLM; {hint}")
    return dict(options)
