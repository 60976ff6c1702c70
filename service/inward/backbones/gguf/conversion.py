"""From a GGUF file to the folder of a Hugging Face model: weights dequantised once, with
settings, tokenizer and chat template beside them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers import logging as transformers_logging

from inward.backbones.gguf import rope, tokens
from inward.backbones.gguf.header import Header
from inward.errors import SetupError

Step = Callable[[str], None]
"""Called with what begins now."""
STEPS = 4
_BLOCK = re.compile(r"^blk\.(\d+)\.")


def architectures() -> frozenset[str]:
    """Names of the decoders that transformers reads from GGUF."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    try:
        from transformers.integrations.gguf import GGUF_CONFIG_ARCHS as newer
    except ImportError:  # before 5.18
        newer = {}
    renamed = {"qwen2moe", "qwen3moe", "gpt-oss", "minimax-m2"}  # as files have them
    no_decoders = {"general", "tokenizer", "t5", "umt5"}
    return (frozenset(GGUF_SUPPORTED_ARCHITECTURES) | frozenset(newer) | renamed) - no_decoders


def convert(header: Header, folder: Path, dtype: str, step: Step) -> None:
    """Writes the model of ``header`` into ``folder``, in ``dtype``.

    Raises:
        SetupError: transformers can't read it, or would read something else than the file holds; what was written by
            then is of no use.
    """
    if header.architecture not in architectures():
        raise SetupError(
            f"{header.path} is of the architecture {header.architecture!r}, which transformers does not read from "
            f"GGUF; it reads {', '.join(sorted(architectures()))}"
        )
    tokens.check_vocabulary(header)
    quiet = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        step("tokenizer")
        tokenizer = tokens.load_tokenizer(header)
        config = _config(header)
        _check_agreement(header, config, tokenizer)
        step("weights")
        state = _weights(header, config, getattr(torch, dtype))
        step("writing")
        _save(config, tokenizer, state, folder)
        step("checking")
    except SetupError:
        raise
    except Exception as error:  # a file can be wrong in more ways than transformers has errors
        raise SetupError(f"{header.path} cannot be converted: {type(error).__name__}: {error}") from error
    finally:
        transformers_logging.set_verbosity(quiet)


def _config(header: Header) -> Any:
    config = AutoConfig.from_pretrained(header.path.parent, gguf_file=header.path.name, local_files_only=True)
    rope.set_rope(config, header)
    eos = tokens.ends(header)
    config.eos_token_id = eos[0] if len(eos) == 1 else eos or None
    for internal in ("_model_name_or_path", "_name_or_path"):
        config.__dict__.pop(internal, None)
    return config


def _check_agreement(header: Header, config: Any, tokenizer: Any) -> None:
    """Compares what the settings promise with what the file holds, before memory is taken for it.

    Raises:
        SetupError: another number of blocks or of weights, more tokens than embeddings, or a chat template that can't
            be used.
    """
    blocks = {int(found[1]) for name in header.tensors if (found := _BLOCK.match(name))}
    stated = header.setting("block_count", int)
    if stated != len(blocks):
        raise SetupError(f"{header.path} says that it has {stated} blocks, and holds tensors of {len(blocks)}")
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    wanted = sum(parameter.numel() for parameter in empty.parameters())
    text = config.get_text_config()
    held = sum(tensor.values for tensor in header.tensors.values() if _is_weight(tensor.name, text.num_hidden_layers))
    if wanted != held:
        raise SetupError(
            f"{header.path} holds {held:,} weights, and a {type(empty).__name__} of its settings has {wanted:,}: "
            f"transformers' reader does not know this variant of {header.architecture!r}, or the file is damaged"
        )
    if len(tokenizer) > text.vocab_size:
        raise SetupError(f"{header.path} has {len(tokenizer)} tokens and embeddings for {text.vocab_size}")
    if tokenizer.chat_template:
        try:
            asked = [{"role": "user", "content": "a"}]
            tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates may raise anything, and the sandbox stops what they must not do
            raise SetupError(f"{header.path}: its chat template can't be used: {error}") from error


def _is_weight(name: str, blocks: int) -> bool:
    """Whether the model has a place for a tensor: none for blocks beyond its own, which predict further tokens."""
    block = _BLOCK.match(name)
    return name not in rope.TABLES and (block is None or int(block[1]) < blocks)


def _weights(header: Header, config: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model, loaded = AutoModelForCausalLM.from_pretrained(
        header.path.parent,
        gguf_file=header.path.name,
        config=config,
        dtype=dtype,
        output_loading_info=True,
        local_files_only=True,
    )
    lacking = sorted({*loaded["missing_keys"], *(str(key) for key in loaded["mismatched_keys"])})
    if lacking:
        raise SetupError(f"{header.path} lacks weights of {type(model).__name__}: {', '.join(lacking[:5])}")
    state: dict[str, torch.Tensor] = model.state_dict()
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise SetupError(f"{header.path} is damaged: {name} holds numbers that are not finite")
    return state


def _save(config: Any, tokenizer: Any, state: dict[str, torch.Tensor], folder: Path) -> None:
    """A model that never heard of GGUF: transformers does not save one whose settings say that it came from there."""
    settings = {key: value for key, value in config.to_dict().items() if key != "quantization_config"}
    config = type(config).from_dict(settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=next(iter(state.values())).dtype)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "pad")}
    model.generation_config = GenerationConfig(eos_token_id=config.eos_token_id, **ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
