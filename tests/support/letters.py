"""A tokenizer for which a token is a character."""

from __future__ import annotations

from typing import ClassVar

from inward.prompts import Prompts


class Letters:
    """One token a character."""

    chat_template = None
    bos_token = bos_token_id = None
    eos_token = pad_token = unk_token = None
    added_tokens_decoder: ClassVar = {}

    def __call__(self, text, *, add_special_tokens):
        return {"input_ids": [[1 + ord(c) % 200 for c in t] for t in text]}


def prompts(max_tokens=500):
    """Rendered as ``prompt: response``."""
    return Prompts(Letters(), max_tokens=max_tokens, format="{prompt}: {response}")
