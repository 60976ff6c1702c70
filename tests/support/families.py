"""The model families that are tried: each a tiny random model of a configuration that transformers knows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import CONFIG_MAPPING

from inward.types import Floats, Ids
from support.tiny_models import LAYERS, VOCABULARY, WIDTH, save_tokenizer

SIZES: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "lru_width"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 128),
    **dict.fromkeys(("intermediate_size", "ffn_dim"), 48),
    **{"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6, "attention_window_size": 6},
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **{"num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    **{"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "decoder_sparse_step": 1},
    **{"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "qk_head_dim": 16},
    **{"v_head_dim": 8, "query_pre_attn_scalar": 8, "state_size": 4, "conv_kernel": 4, "time_step_rank": 4},
    **{"mamba_d_state": 4, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_ssm": 64},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
}
"""Small sizes under all the names that configurations have for them."""


def configuration(kind: str, **more: Any) -> Any:
    """transformers' configuration of this kind with small sizes, and each kind of layer that it has."""
    cls = CONFIG_MAPPING[kind]
    default = cls()
    known = {field.name for field in dataclasses.fields(cls)} | set(cls.attribute_map)
    fixed = {name for name, found in vars(cls).items() if isinstance(found, property) and found.fset is None}
    known -= fixed | {alias for alias, name in cls.attribute_map.items() if name in fixed}
    sizes = {name: size for name, size in SIZES.items() if name in known}
    kinds = getattr(default, "layer_types", None)
    if kinds and "layer_types" in known:
        each = list(dict.fromkeys(kinds))
        sizes["layer_types"] = [each[k % len(each)] for k in range(LAYERS)]
    if getattr(default, "sliding_window", None) is None:
        sizes.pop("sliding_window", None)
    return cls(**{name: size for name, size in (sizes | more).items() if size != "left out"})


def save(kind: str, folder: Path, *, encoder: bool = False, **more: Any) -> Path:
    """A model of this kind with random weights, and a tokenizer of one token a word."""
    torch.manual_seed(0)
    config = configuration(kind, **more)
    auto = transformers.AutoModel if encoder else transformers.AutoModelForCausalLM
    model = auto.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms start as constants, which would hide mistakes
            if parameter.is_floating_point():
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


class Eager:
    """The reference: the model itself with eager attention in float32, one whole text at a time, nothing cached."""

    def __init__(self, folder: Path, *, encoder: bool = False) -> None:
        auto = transformers.AutoModel if encoder else transformers.AutoModelForCausalLM
        options = {"dtype": torch.float32, "attn_implementation": "eager"}
        self.whole = auto.from_pretrained(folder, **options).eval()

    @torch.inference_mode()
    def states(self, ids: Ids) -> tuple[list[Floats], Floats | None]:
        """What enters the first block and leaves each, ``[T, D]``; and what comes after the final norm."""
        seen: list[torch.Tensor] = []
        stacks = [m for m in self.whole.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == LAYERS]
        ends: list[Any] = []
        models = [m for m in self.whole.modules() if isinstance(m, transformers.PreTrainedModel)]
        hooks = [m.register_forward_hook(lambda m, a, out: ends.append(out)) for m in models]
        hooks.append(
            stacks[0][0].register_forward_pre_hook(
                lambda m, a, kw: seen.append(a[0] if a else kw["hidden_states"]), with_kwargs=True
            )
        )
        hooks += [
            block.register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple | list) else out))
            for block in stacks[0]
        ]
        self.whole(torch.tensor([ids]))
        for hook in hooks:
            hook.remove()
        end = next((end for out in ends if (end := getattr(out, "last_hidden_state", None)) is not None), None)
        return [state[0].numpy().copy() for state in seen], None if end is None else end[0].numpy()

    @torch.inference_mode()
    def greedy(self, prompt: Ids, length: int, ends: Sequence[int] = (2,)) -> Ids:
        """The likeliest continuation, up to one of ``ends``."""
        ids: Ids = ()
        while len(ids) < length:
            token = int(self.whole(torch.tensor([prompt + ids])).logits[0, -1].argmax())
            if token in ends:
                break
            ids = (*ids, token)
        return ids


def relative_error(state: Floats, truth: Floats) -> float:
    """The largest difference, relative to the largest number."""
    return float(np.abs(state - truth).max() / np.abs(truth).max())
