"""The policy and what Hugging Face's trainer is told: shared by cDPO and reward models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoTokenizer

from inward_trainer.errors import OptionsError
from inward_trainer.options import ModelOptions


def load_tokenizer(options: ModelOptions) -> Any:
    """The model's, with a padding token."""
    if not options.model:
        raise OptionsError("--model: say which model to train")
    tokenizer = AutoTokenizer.from_pretrained(options.model, revision=options.revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def uses_bf16(options: ModelOptions) -> bool:
    """What was asked, or else whether the GPU can."""
    if options.bf16 is not None:
        return options.bf16
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def weights_dtype(options: ModelOptions) -> torch.dtype:
    """Frozen weights may be bfloat16; trained ones are float32, or small steps would be lost in rounding."""
    return torch.bfloat16 if uses_bf16(options) and not options.full else torch.float32


def lora(options: ModelOptions, task: str) -> LoraConfig | None:
    """The adapter; None where all weights are trained."""
    if options.full:
        return None
    targets = options.lora_targets.split(",")
    return LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        lora_dropout=0.0,  # a policy version must be a function of its weights, and a step done again the same step
        bias="none",
        task_type=task,
    )


def arguments(options: ModelOptions, **more: Any) -> dict[str, Any]:
    """For DPOConfig and RewardConfig."""
    gpu = torch.cuda.is_available()
    checkpointing = gpu if options.gradient_checkpointing is None else options.gradient_checkpointing
    return {
        "output_dir": str(checkpoints(options)),
        "seed": options.seed,
        "data_seed": options.seed,
        "per_device_train_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.accumulate,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": options.schedule,
        "warmup_steps": options.warmup,
        "weight_decay": options.weight_decay,
        "max_length": options.max_length,
        "bf16": uses_bf16(options),
        "gradient_checkpointing": checkpointing,
        "use_cpu": not gpu,
        "dataloader_pin_memory": gpu,
        "logging_strategy": "steps",
        "logging_steps": options.log_every,
        "logging_nan_inf_filter": False,  # it would log a loss that is not a number as 0
        "save_total_limit": 2,  # the newest may be incomplete
        "report_to": "none",
        "ddp_timeout": 24 * 3600,  # other processes wait while the main one samples
        **more,
        **options.training,
    }


def checkpoints(options: ModelOptions) -> Path:
    """Where checkpoints are."""
    return options.out / "checkpoints"
