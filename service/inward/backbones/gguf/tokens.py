"""The tokenizer that a GGUF file describes, as transformers builds it, and what of it transformers leaves out."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

from inward.backbones.gguf.header import Header
from inward.errors import SetupError

BYTE_LEVEL = "gpt2"
DIGIT_BY_DIGIT = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
"""Ways to split text (llama.cpp's names): each digit by itself, the rest as GPT-2. transformers knows no rule."""
AS_GPT2 = frozenset({"default", "gpt-2", "phi-2", "mpt", "olmo", "jais", "gigachat", "mellum"})
WITH_BOS = frozenset(
    {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken"}
)
"""Byte-level vocabularies that take a word whole if it is a token, and begin a text with BOS by default."""
NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""Of special tokens: a tokenizer's name and the file's."""
SPECIAL = (*NAMED.values(), "eot", "eom")


def check_vocabulary(header: Header) -> None:
    """Looks at the vocabulary, its special tokens, and the way to split text.

    Raises:
        SetupError: there is none, or one that transformers would read otherwise than the model learned it.
    """
    tokens = header.get("tokenizer.ggml.tokens", list)
    if not tokens or not all(isinstance(token, str) for token in tokens):
        raise SetupError(
            f"{header.path} holds no tokenizer (tokenizer.ggml.tokens), so text can't be turned into its tokens"
        )
    for name in SPECIAL:
        number = header.get(f"tokenizer.ggml.{name}_token_id", int)
        if number is not None and not 0 <= number < len(tokens):
            raise SetupError(
                f"{header.path}: the {name} token is number {number}, and the vocabulary has {len(tokens)}"
            )
    for name in ("token_type", "scores"):
        values = header.get(f"tokenizer.ggml.{name}", list)
        if values is not None and len(values) != len(tokens):
            raise SetupError(f"{header.path}: {len(values)} entries of tokenizer.ggml.{name} for {len(tokens)} tokens")
    if _kind(header) == BYTE_LEVEL and _split(header) not in known_splits():
        raise SetupError(
            f"{header.path} splits text as {_split(header)!r}, and the installed transformers does not know how: other "
            "tokens than those the model learned would come out. Use the model's own folder, with its tokenizer.json"
        )


def known_splits() -> frozenset[str]:
    """Names of the ways to split text that are carried over rightly."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as theirs
    except ImportError:  # before 5.18
        theirs = {}
    return frozenset(theirs) | DIGIT_BY_DIGIT | AS_GPT2


def load_tokenizer(header: Header) -> Any:
    """The tokenizer, as it is saved for later starts.

    Raises:
        Exception: whatever transformers raises over a vocabulary that it can't build.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    read = AutoTokenizer.from_pretrained(header.path.parent, gguf_file=header.path.name, local_files_only=True)
    backend = _only_of(header.get("tokenizer.ggml.tokens", list), read.backend_tokenizer)
    byte_level, split = _kind(header) == BYTE_LEVEL, _split(header)
    if byte_level and split in DIGIT_BY_DIGIT:
        by_digit = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        backend.pre_tokenizer = pre_tokenizers.Sequence(by_digit)
    if byte_level and split in WITH_BOS:
        backend.model.ignore_merges = True
    special = {f"{ours}_token": _special(header, theirs, read, ours) for ours, theirs in NAMED.items()}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=read.chat_template, **special)
    begins = split in WITH_BOS if byte_level else _kind(header) == "llama"
    tokenizer.add_bos_token = header.get("tokenizer.ggml.add_bos_token", bool, begins)
    tokenizer.add_eos_token = header.get("tokenizer.ggml.add_eos_token", bool, False)
    return tokenizer


def _special(header: Header, name: str, read: Any, attribute: str) -> str | None:
    """What the file states; where it says nothing, what transformers takes. Some of its versions take the beginning of
    a text for its end.
    """
    number = header.get(f"tokenizer.ggml.{name}_token_id", int)
    if number is None:
        found: str | None = getattr(read, f"{attribute}_token")
        return found
    return str(header.get("tokenizer.ggml.tokens", list)[number])


def _only_of(vocabulary: list[str], tokenizer: Tokenizer) -> Tokenizer:
    """``tokenizer`` without tokens that its class brought along (GPT-2's end of text): the model can't embed them."""
    document = json.loads(tokenizer.to_str())
    document["added_tokens"] = [token for token in document["added_tokens"] if token["id"] < len(vocabulary)]
    return Tokenizer.from_str(json.dumps(document))


def ends(header: Header) -> list[int]:
    """Numbers of the tokens that end an answer, the end of sequence first."""
    stated = [header.get(f"tokenizer.ggml.{name}_token_id", int) for name in ("eos", "eot", "eom")]
    return list(dict.fromkeys(number for number in stated if number is not None))


def _kind(header: Header) -> str:
    return str(header.get("tokenizer.ggml.model", str, ""))


def _split(header: Header) -> str:
    return str(header.get("tokenizer.ggml.pre", str, "default"))
