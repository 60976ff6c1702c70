"""What a backbone is, as one short string: a head is fitted for exactly one."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from inward.errors import SetupError

_VOLATILE = frozenset(
    "transformers_version dtype torch_dtype _name_or_path use_cache _attn_implementation attn_implementation".split()
)
_BLOCKS, _BLOCK = 64, 4096
ORIGIN = "gguf.json"
"""In the folder of a model that was converted from a GGUF file: what of (``gguf.cache`` writes it)."""
_SHAPING = (
    "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "intermediate_size", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "sliding_window",
    "tie_word_embeddings", "eos_token_id",
)  # fmt: skip
"""Settings that shape a converted model; others come with the version of transformers that wrote them."""


@dataclass(frozen=True, slots=True)
class Origin:
    """The GGUF file that a folder was made of, and how."""

    file: str
    """Its name, for people."""
    sha256: str
    conversion: int
    """Number of the way of conversion."""
    tokens: str
    """Stands for what the tokenizer and the chat template do, however they are written down."""
    seal: str = ""
    """Over all of this and the files of the folder as they were written: breaks when any of them changes."""

    @classmethod
    def read(cls, folder: Path) -> Origin | None:
        """None: the folder was not converted, or has changed since.

        Raises:
            SetupError: as ``fingerprint``.
        """
        try:
            origin = cls(**json.loads((folder / ORIGIN).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        return origin if origin.sealed(folder) == origin else None

    def sealed(self, folder: Path) -> Origin:
        """The same with the seal of ``folder`` as it is now."""
        content = _canonical([self.file, self.sha256, self.conversion, self.tokens, _of_files(folder)])
        return replace(self, seal=hashlib.sha256(content).hexdigest())

    def write(self, folder: Path) -> None:
        """Seals the folder."""
        (folder / ORIGIN).write_text(json.dumps(asdict(self.sealed(folder)), indent=2) + "\n", encoding="utf-8")


def fingerprint(folder: Path) -> str:
    """The print of the model in ``folder``: its configuration, its tokenizer and its weights, whatever dtype serves
    them.

    Of weights as saved it covers names, shapes and dtypes of all tensors and 64 blocks of 4 KiB, evenly spaced, of
    every file: enough to tell models and checkpoints apart without reading gigabytes, not a proof against somebody who
    edits weights on purpose.

    A model that was converted from GGUF is the same in whichever dtype its weights are kept: there the hash of the GGUF
    file stands for the weights, for as long as the folder is as the conversion left it. One that was changed since has
    the print of its own files, which no head of the original fits.

    Raises:
        SetupError: the folder has no ``config.json`` or no safetensors, or one is damaged.
    """
    origin = Origin.read(folder)
    if origin is None:
        return f"sha256:{_of_files(folder)[:32]}"
    config = _stable(_json(folder / "config.json"))
    shape = {key: config[key] for key in _SHAPING if key in config}
    content = _canonical(["gguf", origin.sha256, origin.conversion, origin.tokens, shape])
    return f"sha256:{hashlib.sha256(content).hexdigest()[:32]}"


def _of_files(folder: Path) -> str:
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise SetupError(f"{folder} holds no *.safetensors; convert the weights (save_pretrained writes them)")
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
        raise SetupError(f"{file} is not a readable safetensors file: {error}") from error
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
        raise SetupError(f"{file} cannot be read as JSON: {error}") from error


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
