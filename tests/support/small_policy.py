"""A policy small enough to be trained in a second, rows for it, and an early end of them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers

import inward
from inward_trainer.options import CdpoOptions
from inward_trainer.sources import Ended
from inward_trainer.sources.samples import SampledPairs
from support.tiny_tokenizer import TEXTS
from support.tiny_tokenizer import of_transformers as tokenizer

DEMO = Path(inward.__file__).parent / "models/toy"


def write_policy(folder, *, seed=5):
    """A Llama of two blocks with random weights, and its tokenizer."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=256, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def rows(n):
    return [
        {
            "prompt": f"{i}: {TEXTS[i % len(TEXTS)][:20]}",
            "chosen": f" {TEXTS[(i + 1) % len(TEXTS)][:30]}",
            "rejected": f" No {i}.",
        }
        for i in range(n)
    ]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def options(**more):
    """Few steps, nothing by the way."""
    quick = {
        "batch_size": 2,
        "learning_rate": 1e-2,
        "max_length": 128,
        "lora_rank": 4,
        "tensorboard": False,
        "bf16": False,
    }
    return CdpoOptions(**{**quick, "training": {"disable_tqdm": True}, **more})


def ends_after(patch, prompts):
    """A source of samples that has no more after so many prompts."""
    original = SampledPairs.take

    def take(self, n, cursor):
        if int(cursor or 0) >= prompts:
            raise Ended
        return original(self, n, cursor)

    patch.setattr(SampledPairs, "take", take)
