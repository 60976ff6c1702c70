"""Small real parts for tests: a tokenizer of its own, random models of several shapes. Nothing is downloaded."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from inward.backbones.tokenizer import FolderTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEXTS = (
    "The harbour was quiet that morning, and the boats lay still.",
    "Please explain how a lock on a canal works, step by step.",
    "I would rather not help with that, but here is a safer way to do it.",
    "She counted seven birds on the wire: two crows and five starlings.",
    "Human: What is the tallest tree?\n\nAssistant: The coast redwood, at about 115 metres.",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


SPECIAL = ("<s>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")


def byte_level(special: Sequence[str], size: int, *, bos: str | None = None) -> Tokenizer:
    """A byte-level BPE of ``size`` entries, which writes ``bos`` before a text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(TEXTS, trainer)
    if bos is not None:
        named = [(bos, list(special).index(bos))]
        bpe.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=named)
    return bpe


def saved(backend: Tokenizer, **config: str | None) -> FolderTokenizer:
    """``backend`` as a model's folder has it, beside what a ``tokenizer_config.json`` would say."""
    with tempfile.TemporaryDirectory() as folder:
        backend.save(f"{folder}/tokenizer.json")
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config))
        return FolderTokenizer(Path(folder))


def tokenizer(*, chat: bool = True, bos: bool = True) -> FolderTokenizer:
    """A byte-level BPE of 400 entries; ``bos`` makes it add a BOS by itself, as Llama's does."""
    return saved(
        byte_level(SPECIAL, 400, bos="<s>" if bos else None),
        **_names(bos),
        chat_template=CHAT_TEMPLATE if chat else None,
    )


def of_transformers(*, chat: bool = True, bos: bool = True) -> PreTrainedTokenizerFast:
    """The same as transformers has it, to train with and to save."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=byte_level(SPECIAL, 400, bos="<s>" if bos else None), **_names(bos))
    fast.chat_template = CHAT_TEMPLATE if chat else None
    return fast


def _names(bos: bool) -> dict[str, str]:
    return {"eos_token": "<|end|>", "pad_token": "<|end|>"} | ({"bos_token": "<s>"} if bos else {})
