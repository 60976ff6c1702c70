"""The policy and what Hugging Face's trainer is told: shared by cDPO and reward models."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig, PeftModel
from transformers import AutoTokenizer

from inward_trainer.errors import OptionsError
from inward_trainer.options import ModelOptions

C = TypeVar("C")
ALL_LINEAR = "all-linear"
PACKAGES = {"comet_ml": "comet_ml", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow", "swanlab": "swanlab"}
"""Of trackers that are often named, what must be installed."""
OWN = {
    "beta": "--beta",
    "bf16": "--bf16",
    "data_seed": "--seed",
    "gradient_accumulation_steps": "--accumulate",
    "gradient_checkpointing": "--gradient-checkpointing",
    "ignore_data_skip": "the command's own",
    "learning_rate": "--learning-rate",
    "logging_steps": "--log-every",
    "logging_strategy": "--log-every",
    "loss_type": "the command's own",
    "lr_scheduler_type": "--schedule",
    "max_length": "--max-length",
    "max_steps": "--steps",
    "num_train_epochs": "--epochs",
    "output_dir": "--out",
    "per_device_eval_batch_size": "--batch-size",
    "per_device_train_batch_size": "--batch-size",
    "report_to": "--report-to",
    "save_steps": "--checkpoint-every",
    "save_strategy": "--checkpoint-every",
    "save_total_limit": "--keep-checkpoints",
    "seed": "--seed",
    "warmup_steps": "--warmup",
    "weight_decay": "--weight-decay",
}
"""Arguments of Hugging Face's trainer that options of ours set. A step is sized by them, and a run that goes on
compares them with those that it began with.
"""


def load_tokenizer(folder: Path) -> Any:
    """The model's, with a padding token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(kind: Any, folder: Path, options: ModelOptions, **more: Any) -> Any:
    """The model of ``folder``, with the adapter to begin with if there is one.

    Raises:
        OptionsError: the folder holds no such model, or the adapter is none of it.
    """
    quantized = _quantization(options)
    given = {"attn_implementation": options.attn_implementation, "quantization_config": quantized}
    try:
        model = kind.from_pretrained(
            folder, dtype=weights_dtype(options), **{name: v for name, v in given.items() if v is not None}, **more
        )
    except (ValueError, ImportError, OSError) as error:
        raise OptionsError(f"--model: {folder} can't be loaded: {first_line(error)}") from error
    if quantized is not None:
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=uses_checkpointing(options))
    if options.adapter is None:
        check_targets(model, options)
        return model
    try:
        return PeftModel.from_pretrained(model, str(options.adapter), is_trainable=True)
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        raise OptionsError(f"--adapter: {options.adapter} is no adapter of this model: {first_line(error)}") from error


def uses_bf16(options: ModelOptions) -> bool:
    """What was asked, or else whether the GPU can."""
    if options.bf16 is not None:
        return options.bf16
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def uses_checkpointing(options: ModelOptions) -> bool:
    """Whether activations are computed twice: what was asked, or else on a GPU."""
    return torch.cuda.is_available() if options.gradient_checkpointing is None else options.gradient_checkpointing


def weights_dtype(options: ModelOptions) -> torch.dtype:
    """Frozen weights may be bfloat16; trained ones are float32, or small steps would be lost in rounding."""
    return torch.bfloat16 if uses_bf16(options) and not options.full else torch.float32


def lora(options: ModelOptions, task: str) -> LoraConfig | None:
    """The new adapter; None where all weights are trained, or an adapter that is there goes on."""
    if options.full or options.adapter is not None:
        return None
    targets = targets_of(options)
    return LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        target_modules=ALL_LINEAR if targets == [ALL_LINEAR] else targets,
        lora_dropout=0.0,  # a policy version must be a function of its weights, and a step done again the same step
        bias="none",
        task_type=task,
    )


def targets_of(options: ModelOptions) -> list[str]:
    """``--lora-targets`` one by one."""
    return [target for target in map(str.strip, options.lora_targets.split(",")) if target]


def check_targets(model: Any, options: ModelOptions) -> None:
    """Raises ``OptionsError`` where a target is no module: peft passes over it as long as another one is."""
    if options.full or (targets := targets_of(options)) == [ALL_LINEAR]:
        return
    names = [name for name, _ in model.named_modules()]
    unknown = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]
    if unknown or not targets:
        linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
        raise OptionsError(f"--lora-targets: the model has no {', '.join(unknown) or 'module of no name'}; it has "
                           f"{', '.join(linear)}")  # fmt: skip


def configuration(kind: Callable[..., C], options: ModelOptions, **more: Any) -> C:
    """DPOConfig or RewardConfig.

    Raises:
        OptionsError: an argument that it does not take, or that an option of ours sets.
    """
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if unknown := [name for name in options.training if name not in known]:
        raise OptionsError(f"--training: the trainer takes no {', '.join(unknown)}")
    if own := [f"{name} is {OWN[name]}" for name in options.training if name in OWN]:
        raise OptionsError(f"--training: {', '.join(own)}")
    for tracker in options.report_to:
        if importlib.util.find_spec(PACKAGES.get(tracker, tracker.replace("-", "_"))) is None:
            raise OptionsError(f"--report-to {tracker}: it is not installed: pip install {tracker}")
    try:
        return kind(**(arguments(options) | more | options.training))
    except (TypeError, ValueError, ImportError, RuntimeError) as error:
        raise OptionsError(f"the trainer refuses its options: {first_line(error)}") from error


def arguments(options: ModelOptions) -> dict[str, Any]:
    """What both trainers are told."""
    gpu = torch.cuda.is_available()
    return {
        "output_dir": str(checkpoints(options)),
        "seed": options.seed,
        "data_seed": options.seed,
        "per_device_train_batch_size": options.batch_size,
        "per_device_eval_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.accumulate,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": options.schedule,
        "warmup_steps": options.warmup,
        "weight_decay": options.weight_decay,
        "max_length": options.max_length,
        "bf16": uses_bf16(options),
        "gradient_checkpointing": uses_checkpointing(options),
        "use_cpu": not gpu,
        "dataloader_pin_memory": gpu,
        "logging_strategy": "steps",
        "logging_steps": options.log_every,
        "logging_nan_inf_filter": False,  # it would log a loss that is not a number as 0
        "save_total_limit": options.keep_checkpoints,
        "report_to": list(options.report_to) or "none",
        "ddp_timeout": 24 * 3600,  # other processes wait while the main one samples
    }


def checkpoints(options: ModelOptions) -> Path:
    """Where checkpoints are."""
    return options.out / "checkpoints"


def _quantization(options: ModelOptions) -> Any:
    """How frozen weights are kept in memory (QLoRA, arXiv 2305.14314); None: in full."""
    if options.quantize is None:
        return None
    if options.full:
        raise OptionsError("--quantize is for frozen weights: leave out --full")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise OptionsError("--quantize needs bitsandbytes: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    if options.quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=weights_dtype(options),
    )


def first_line(error: BaseException) -> str:
    """Of what an error says; many libraries' errors are pages."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
