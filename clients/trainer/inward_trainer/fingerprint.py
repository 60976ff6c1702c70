"""What a model is, as one short string: the one that the service tells of its own.

The service computes it in ``inward.backbones.fingerprint``, which a trainer on another machine does not have; a test
holds the two together.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from inward_trainer.errors import OptionsError

_VOLATILE = frozenset(
    "transformers_version dtype torch_dtype _name_or_path use_cache _attn_implementation attn_implementation".split()
)
_BLOCKS, _BLOCK = 64, 4096
_ORIGIN = "gguf.json"
"""In the folder of a model that was converted from a GGUF file."""
_SHAPING = (
    "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "intermediate_size", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "sliding_window",
    "tie_word_embeddings", "eos_token_id",
)  # fmt: skip
"""Settings that shape a converted model; others come with the version of transformers that wrote them."""


def fingerprint(folder: Path) -> str:
    """The print of configuration, tokenizer and weights in ``folder``; of a model that was converted from GGUF, and is
    as the conversion left it, that of the file that it was made of.

    Raises:
        OptionsError: the folder holds no model with safetensors, or one is damaged.
    """
    files = _of_files(folder)
    origin = _origin(folder, files)
    if origin is None:
        return f"sha256:{files[:32]}"
    config = _stable(_json(folder / "config.json"))
    shape = {key: config[key] for key in _SHAPING if key in config}
    content = _canonical(["gguf", origin["sha256"], origin["conversion"], origin["tokens"], shape])
    return f"sha256:{hashlib.sha256(content).hexdigest()[:32]}"


def _origin(folder: Path, files: str) -> dict[str, Any] | None:
    """Which file the folder was made of, if its seal is whole."""
    try:
        origin: dict[str, Any] = json.loads((folder / _ORIGIN).read_text(encoding="utf-8"))
        content = _canonical([*(origin[name] for name in ("file", "sha256", "conversion", "tokens")), files])
        return origin if origin["seal"] == hashlib.sha256(content).hexdigest() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _of_files(folder: Path) -> str:
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise OptionsError(f"{folder} holds no *.safetensors; convert the weights (save_pretrained writes them)")
    digest = hashlib.sha256()
    digest.update(_canonical(_stable(_json(folder / "config.json"))))
    if (folder / "tokenizer.json").is_file():
        tokenizer = _json(folder / "tokenizer.json")
        digest.update(
            _canonical({key: part for key, part in tokenizer.items() if key not in ("truncation", "padding")})
        )
    for file in weights:
        digest.update(_weights(file))
    return digest.hexdigest()


def _weights(file: Path) -> bytes:
    """Of names, shapes and dtypes of all tensors, and evenly spaced blocks of the rest."""
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
            header.pop("__metadata__", None)
            digest.update(_canonical(header))
            start = stream.tell()
            last = max(file.stat().st_size - start - _BLOCK, 0)
            for i in range(_BLOCKS):
                stream.seek(start + last * i // (_BLOCKS - 1))
                digest.update(stream.read(_BLOCK))
    except (OSError, ValueError, OverflowError, MemoryError) as error:
        raise OptionsError(f"{file} is not a readable safetensors file: {error}") from error
    return digest.digest()


def _stable(config: Any) -> Any:
    """``config`` without what changes when the same model is saved again or served otherwise, at any depth."""
    if isinstance(config, dict):
        return {key: _stable(part) for key, part in config.items() if key not in _VOLATILE}
    return [_stable(part) for part in config] if isinstance(config, list) else config


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionsError(f"{file} cannot be read as JSON: {error}") from error


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
