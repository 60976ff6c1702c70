"""Small real parts for tests: a tokenizer of its own, random models of several shapes. Nothing is downloaded."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
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


def tokenizer(*, chat: bool = True, bos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 entries; ``bos`` makes it add a BOS by itself, as Llama's does."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<s>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXTS, trainer)
    if bos:
        bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    names: dict[str, Any] = {"bos_token": "<s>"} if bos else {}
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>", **names)
    fast.chat_template = CHAT_TEMPLATE if chat else None
    return fast
