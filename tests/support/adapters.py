"""LoRA adapters for tests: trained by nobody, saved as PEFT saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

CONFIG = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj"],
    "bias": "none",
    "init_lora_weights": True,
}
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


def write_adapter(folder: Path, *, tensors: dict[str, Any] | None = None, **config: Any) -> Path:
    """A folder with a configuration and matrices; by default of one module of width 16."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    shapes = {f"{Q_PROJ}.lora_A.weight": (2, 16), f"{Q_PROJ}.lora_B.weight": (16, 2)} if tensors is None else tensors
    save_file(
        {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return folder


def train_adapter(model: Path, folder: Path, *, seed: int = 1, size: float = 0.3, **config: Any) -> Any:
    """PEFT's own adapter of a model, with random matrices, saved in ``folder``; returns PEFT's model, which computes
    with it."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = get_peft_model(
        base, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **config})
    ).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(size * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return adapted
