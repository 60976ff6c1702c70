"""Small GGUF files, written as llama.cpp's converter writes them: a Llama of random weights whose tokens are bytes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

BYTES = sorted(bytes_to_unicode().items())
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>"]
TOKENS = [*SPECIAL, *(letter for _, letter in BYTES), "Ġt", "he", "Ġthe", "ĠĠ"]
MERGES = ["Ġ t", "h e", "Ġt he", "Ġ Ġ"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONFIG = LlamaConfig(
    vocab_size=len(TOKENS), hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=256, rms_norm_eps=1e-5, tie_word_embeddings=True,
    bos_token_id=None, eos_token_id=0, pad_token_id=0, rope_parameters={"rope_type": "default", "rope_theta": 50_000.0},
)  # fmt: skip
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
KEYS: Mapping[str, Any] = {
    "llama.block_count": 3, "llama.context_length": 256, "llama.embedding_length": 64, "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.rope.freq_base": 50_000.0,
    "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.dimension_count": 16, "llama.vocab_size": len(TOKENS),
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)),
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.padding_token_id": 0, "tokenizer.ggml.add_bos_token": False,
    "tokenizer.chat_template": TEMPLATE,
}  # fmt: skip


def random_llama(config: LlamaConfig = CONFIG) -> LlamaForCausalLM:
    """The model whose weights ``write`` writes."""
    torch.manual_seed(3)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.ndim == 1))
    return model.eval()


def tensors_of(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    """Its weights under GGUF's names."""
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    tensors = {}
    for name, weight in model.model.named_parameters():
        values = weight.detach().numpy()
        if name.startswith("layers."):
            _, block, rest = name.split(".", 2)
            short = NAMES[rest.removesuffix(".weight")]
            tensors[f"blk.{block}.{short}.weight"] = _permuted(values, heads[short]) if short in heads else values
        else:
            tensors[{"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}[name]] = values
    return tensors


def write(
    path: Path,
    *,
    architecture: str = "llama",
    keys: Mapping[str, Any] = {},
    without: Collection[str] = (),
    tensors: Mapping[str, np.ndarray] = {},
    quantised: GGMLQuantizationType | None = None,
    model: LlamaForCausalLM | None = None,
) -> LlamaForCausalLM:
    """Writes ``random_llama`` and returns it.

    Args:
        keys: beside, or instead of, ``KEYS``.
        without: keys and tensors to leave out.
        tensors: beside, or instead of, the model's.
        quantised: type of the matrices.
    """
    model = model or random_llama()
    writer = GGUFWriter(path, architecture)
    for key, value in {**KEYS, **keys}.items():
        if key not in without:
            _add(writer, key, value)
    for name, values in {**tensors_of(model), **tensors}.items():
        if name in without:
            continue
        if quantised is not None and values.ndim == 2:
            writer.add_tensor(name, quantize(values, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _permuted(values: np.ndarray, heads: int) -> np.ndarray:
    """As ``convert_hf_to_gguf.py`` does: ggml rotates neighbours, transformers rotates halves."""
    return values.reshape(heads, 2, values.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(values.shape)
