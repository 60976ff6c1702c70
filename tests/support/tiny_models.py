"""Tiny random models, saved as a user's model folder is, and the plain forward that everything is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from inward.types import Floats, Group, Ids, Position

LAYERS, WIDTH, VOCABULARY = 3, 32, 64
_SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
_LLAMA: dict[str, Any] = _SIZES | {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def configuration(kind: str) -> Any:
    t = transformers
    return {
        "llama": lambda: t.LlamaConfig(**_LLAMA),
        "mistral": lambda: t.MistralConfig(**_LLAMA, sliding_window=5),
        "qwen2": lambda: t.Qwen2Config(**_LLAMA, use_sliding_window=True, sliding_window=6, max_window_layers=1),
        "gpt2": lambda: t.GPT2Config(**_SIZES, n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_positions=128),
        "gpt_neox": lambda: t.GPTNeoXConfig(
            **_SIZES,
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            max_position_embeddings=128,
        ),
        "bloom": lambda: t.BloomConfig(**_SIZES, hidden_size=WIDTH, n_layer=LAYERS, n_head=4),
        "mamba": lambda: t.MambaConfig(**_SIZES, hidden_size=WIDTH, num_hidden_layers=LAYERS, state_size=4),
        "bert": lambda: t.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
        ),
    }[kind]()


def save(kind: str, folder: Path) -> Path:
    """A model with random weights and a tokenizer of one token a word."""
    torch.manual_seed(0)
    config = configuration(kind)
    model = transformers.BertModel(config) if kind == "bert" else transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms start as constants, which would hide mistakes
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return save_tokenizer(folder)


def save_tokenizer(folder: Path) -> Path:
    """A tokenizer of one token a word."""
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w1", eos_token="w2").save_pretrained(
        folder
    )
    return folder


class Plain:
    """The reference: one text at a time, ``output_hidden_states=True``, float32."""

    def __init__(self, folder: Path) -> None:
        self.model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    def states(self, ids: Ids, layer: int, *, final_norm: bool = False) -> Floats:
        """``[T, D]``. The stream before the final norm is what the last block returns, which Hugging Face does not
        report."""
        last: list[torch.Tensor] = []
        blocks = next(m for m in self.model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == LAYERS)
        hook = blocks[-1].register_forward_hook(
            lambda m, a, out: last.append(out[0] if isinstance(out, tuple) else out)
        )
        with torch.inference_mode():
            hidden = self.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        hook.remove()
        chosen = last[0] if layer == LAYERS and not final_norm else hidden[layer]
        return chosen.reshape(len(ids), -1).numpy()

    def read(
        self, prompt: Ids, response: Ids, layer: int, position: Position, *, final_norm: bool = False, eos: int = 2
    ) -> Floats:
        """``[D]``."""
        ids = prompt + response + ((eos,) if position == "eos" else ())
        states = self.states(ids, layer, final_norm=final_norm)
        if position == "prompt":
            return states[len(prompt) - 1]
        if position == "mean" and response:
            return states[len(prompt) :].mean(axis=0)
        return states[-1]


def random_ids(rng: np.random.Generator, length: int) -> Ids:
    return tuple(rng.integers(3, VOCABULARY, length).tolist())


def random_group(rng: np.random.Generator, responses: int, longest: int = 12) -> Group:
    prompt = random_ids(rng, int(rng.integers(1, longest)))
    return Group(prompt, tuple(random_ids(rng, int(rng.integers(0, longest))) for _ in range(responses)))
