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


def fingerprint(folder: Path) -> str:
    """The print of configuration, tokenizer and weights in ``folder``.

    Raises:
        OptionsError: the folder holds no model with safetensors, or one is damaged.
    """
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
    return f"sha256:{digest.hexdigest()[:32]}"


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
