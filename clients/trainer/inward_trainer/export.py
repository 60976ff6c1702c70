"""``inward-train export``: an adapter that was learnt, merged into its base model or as it is, in a folder or on the
hub.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from inward_trainer.base_model import find_model
from inward_trainer.errors import OptionsError
from inward_trainer.models import first_line, load_tokenizer
from inward_trainer.options import ExportOptions

LOG = logging.getLogger(__name__)
CARD = "README.md"
"""TRL's, written for a run: it names folders of this machine."""


def run(options: ExportOptions) -> int:
    """Writes the model, and uploads it if that is asked for. The exit status.

    Raises:
        OptionsError: there is no such adapter or model, the folder is taken, or the hub refuses.
    """
    if options.adapter is None or options.out is None:
        raise OptionsError("--adapter and --out: say what to export, and where to")
    if options.out.exists() and any(options.out.iterdir()):
        raise OptionsError(f"--out: {options.out} is there already; choose another folder")
    try:
        config = PeftConfig.from_pretrained(str(options.adapter))
    except (ValueError, OSError) as error:
        raise OptionsError(f"--adapter: {options.adapter} is no adapter: {first_line(error)}") from error
    folder = find_model(options.model or config.base_model_name_or_path or "", options.revision)
    scores = config.task_type == "SEQ_CLS"
    model = _load(folder, options.adapter, options.dtype, scores=scores)
    if options.merge:
        model = model.merge_and_unload(safe_merge=True)
    model.save_pretrained(options.out)
    (load_tokenizer(folder) if scores else AutoTokenizer.from_pretrained(folder)).save_pretrained(options.out)
    LOG.info("%s: %s", options.out, "the whole model" if options.merge else "the adapter")
    if options.push_to is not None:
        _push(options.out, options.push_to, private=options.private)
    return 0


def _load(folder: Path, adapter: Path, dtype: str, *, scores: bool) -> Any:
    """The base model with the adapter: a policy, or a reward model with the score head that the adapter holds."""
    kind = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    try:
        model = kind.from_pretrained(folder, dtype=getattr(torch, dtype), **({"num_labels": 1} if scores else {}))
        if scores:  # of the last token before the padding
            model.config.get_text_config().pad_token_id = load_tokenizer(folder).pad_token_id
        return PeftModel.from_pretrained(model, str(adapter))
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        raise OptionsError(f"--adapter: {adapter} is no adapter of {folder}: {first_line(error)}") from error


def _push(folder: Path, name: str, *, private: bool) -> None:
    import huggingface_hub

    try:
        hub = huggingface_hub.HfApi()
        hub.create_repo(name, private=private, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=folder, ignore_patterns=[CARD])
    except Exception as error:  # the hub's errors are many, and network stacks raise more
        raise OptionsError(f"--push-to {name}: {first_line(error)} (is HF_TOKEN set?)") from error
    LOG.info("uploaded to %s", name)
