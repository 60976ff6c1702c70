"""A causal LM (or an encoder, for scoring only) brought into memory, and where its parts are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers import logging as transformers_logging
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from inward.backbones.device import choose_device, choose_dtype, use_available_cpus
from inward.backbones.transformers.stream import find_stream
from inward.errors import SetupError


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A loaded model. ``whole`` has the LM head where there is one, ``base`` has not; ``blocks`` are the base's L
    blocks, between which the residual stream of this ``width`` runs.
    """

    whole: Any
    base: Any
    blocks: torch.nn.ModuleList
    width: int
    generates: bool
    final_norm: bool = True
    """Whether what comes after the final norm is as wide as the stream, and so can be read as one more place."""

    @property
    def config(self) -> Any:
        return self.base.config.get_text_config()

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        return self.base.device  # type: ignore[no-any-return]


def load_model(folder: Path, dtype: str = "auto", device: str = "auto", *, trust_remote_code: bool = False) -> Model:
    """Loads the model in ``folder`` from safetensors, with eager attention: the one implementation that leaves out
    nothing that a model asks of it (``selfcheck`` finds out whether a faster one does the same).

    Args:
        dtype: see ``device.choose_dtype``; for ``device`` see ``device.choose_device``.

    Raises:
        SetupError: files are missing or damaged, or the architecture has no residual stream that could be read.
    """
    transformers_logging.disable_progress_bar()  # a log has no place for it
    on = choose_device(device)
    if on.type == "cpu":
        use_available_cpus()
    options = {
        "dtype": choose_dtype(dtype, on),
        "attn_implementation": "eager",
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
    whole.config.return_dict = True
    base = _base(whole)
    text = base.config.get_text_config()
    if getattr(text, "is_encoder_decoder", False):
        raise SetupError(f"{folder} holds an encoder-decoder model; Inward reads decoders and encoders")
    stream = find_stream(base, text.num_hidden_layers, int(text.vocab_size), f"{type(base).__name__} in {folder}")
    return Model(whole, base, stream.blocks, stream.width, generates, stream.final_norm)


def _generates(config: Any) -> bool:
    """Whether the checkpoint was saved with an LM head; without one the head would be random."""
    names = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return any(name in names or name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or ())


def _base(whole: Any) -> Any:
    """The model without its LM head. Some name another attribute than the one that holds it (Llama 4's text model)."""
    if whole.base_model is not whole or not hasattr(whole, "lm_head"):
        return whole.base_model
    return next((child for child in whole.children() if isinstance(child, PreTrainedModel)), whole)
