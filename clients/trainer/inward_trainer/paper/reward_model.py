"""Reward models of the backbone's size, by TRL's RewardTrainer: what our heads are compared with, and what margins are
for.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import PrinterCallback, set_seed
from trl import RewardConfig, RewardTrainer

from inward_client.rows import Pair
from inward_trainer.paper.batches import most_trained
from inward_trainer.paper.classifier import Classifier, open_classifier
from inward_trainer.paper.language_model import reading_dtype
from inward_trainer.paper.texts import encode_pairs
from inward_trainer.tokens import Tokeniser

BATCH = 32
LEARNING_RATE = 3e-5


def train_reward_model(
    folder: Path,
    tokeniser: Tokeniser,
    pairs: Sequence[Pair],
    *,
    margins: Sequence[float] | None = None,
    device: torch.device,
    seed: int,
) -> Classifier:
    """Trains all weights for one epoch with ``-log sigmoid(r_c - r_r - margin)``."""
    disable_progress_bars()
    tokenizer = tokeniser.tokenizer
    pad = tokenizer.pad_token_id
    encoded = encode_pairs(tokeniser, pairs)
    columns: list[dict[str, Any]] = [{"chosen_ids": c.ids, "rejected_ids": r.ids} for c, r in encoded]
    if margins is not None:
        columns = [row | {"margin": float(margin)} for row, margin in zip(columns, margins, strict=True)]
    longest = max(len(ids) for row in columns for ids in (row["chosen_ids"], row["rejected_ids"]))
    gpu = device.type == "cuda"
    micro = min(BATCH, max(1, most_trained(device) // (2 * longest)))
    micro = 2 ** (micro.bit_length() - 1)
    set_seed(seed)
    with tempfile.TemporaryDirectory() as scratch:
        config = RewardConfig(
            output_dir=scratch, seed=seed, data_seed=seed, learning_rate=LEARNING_RATE, num_train_epochs=1,
            lr_scheduler_type="cosine", warmup_steps=0.1, weight_decay=0.01, max_length=None,
            per_device_train_batch_size=micro, gradient_accumulation_steps=max(1, BATCH // micro),
            use_cpu=not gpu, bf16=reading_dtype(device) is torch.bfloat16, gradient_checkpointing=False,
            dataloader_pin_memory=gpu,
            logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=not gpu,
        )  # fmt: skip
        model = open_classifier(folder, pad, torch.float32)
        trainer = RewardTrainer(
            model=model, args=config, train_dataset=Dataset.from_list(columns), processing_class=tokenizer
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return Classifier(
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).to(device, reading_dtype(device)), pad
    )
