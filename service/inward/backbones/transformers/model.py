"""A causal LM (or an encoder, for scoring only) brought into memory, and where its parts are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers import logging as transformers_logging
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from inward.errors import SetupError


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A loaded model. ``whole`` has the LM head where there is one, ``base`` has not; ``blocks`` are the base's L
    blocks.
    """

    whole: Any
    base: Any
    blocks: torch.nn.ModuleList
    generates: bool

    @property
    def config(self) -> Any:
        return self.base.config.get_text_config()

    @property
    def width(self) -> int:
        return int(self.config.hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        return self.base.device  # type: ignore[no-any-return]


def load_model(folder: Path, dtype: str = "auto", device: str = "auto", *, trust_remote_code: bool = False) -> Model:
    """Loads the model in ``folder`` from safetensors.

    Args:
        dtype: a torch dtype's name; ``auto`` is bfloat16 where the processor multiplies it natively, else float32.
        device: torch's name of one; ``auto`` is a CUDA GPU if there is one.

    Raises:
        SetupError: files are missing or damaged, or the architecture has no stack of blocks to read.
    """
    transformers_logging.disable_progress_bar()  # a log has no place for it
    on = choose_device(device)
    options = {
        "dtype": choose_dtype(dtype, on),
        "use_safetensors": True,
        "local_files_only": True,
        "trust_remote_code": trust_remote_code,
    }
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        generates = _generates(config)
        loader = AutoModelForCausalLM if generates else AutoModel
        whole = loader.from_pretrained(folder, **options).to(on).eval().requires_grad_(False)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise SetupError(f"the model in {folder} cannot be loaded: {error}") from error
    base = whole.base_model
    text = base.config.get_text_config()
    if getattr(text, "is_encoder_decoder", False):
        raise SetupError(f"{folder} holds an encoder-decoder model; Inward reads decoders and encoders")
    blocks = [m for m in base.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == text.num_hidden_layers]
    if not blocks:
        raise SetupError(
            f"{type(base).__name__} in {folder} has no list of {text.num_hidden_layers} blocks that could be read"
        )
    return Model(whole, base, blocks[0], generates)


def _generates(config: Any) -> bool:
    """Whether the checkpoint was saved with an LM head; without one the head would be random."""
    names = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return any(name in names or name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or ())


def choose_device(device: str) -> torch.device:
    if device != "auto":
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Raises SetupError for a name that is no floating dtype of torch."""
    if dtype == "auto":
        native = (
            torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else cpu_has_bfloat16()
        )
        return torch.bfloat16 if native else torch.float32
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise SetupError(f"{dtype!r} is no dtype for a model: use auto, float32, bfloat16 or float16")
    return found


def cpu_has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this processor multiplies bfloat16 natively: AVX512-BF16 or AMX (400-480 GFLOP/s a core against 105 in
    float32).
    """
    try:
        flags = next(line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")).split()
    except (OSError, StopIteration):
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def max_tokens(config: Any, tokenizer: Any) -> int:
    """The longest text that the model takes, in tokens."""
    names = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
    stated = next((limit for name in names if (limit := getattr(config, name, None))), None)
    known = [
        int(limit) for limit in (stated, _rope_limit(config), tokenizer.model_max_length) if limit and limit < 10**9
    ]
    return min(known, default=2048)  # a tokenizer without a limit states 1e30


def _rope_limit(config: Any) -> int | None:
    """Up to here rotary frequencies are constant. Beyond it, ``dynamic`` and ``longrope`` choose them by the longest
    text of the batch (and ``dynamic`` by texts before it), so that a state would depend on its neighbours.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") not in ("dynamic", "longrope"):
        return None
    name = "original_max_position_embeddings"
    return int(rope.get(name) or getattr(config, name, None) or config.max_position_embeddings)
