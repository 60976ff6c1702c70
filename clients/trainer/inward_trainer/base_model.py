"""Which model is trained: found, and compared with the service's before anything is drawn."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inward_trainer.errors import OptionsError
from inward_trainer.fingerprint import fingerprint
from inward_trainer.models import first_line, load_tokenizer
from inward_trainer.service import Info
from inward_trainer.tokens import Tokeniser

SERVICE = "service"
"""As ``--model``: whatever the service serves."""
FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
"""Safetensors and text only: weights in pickled form are never fetched."""


@dataclass(frozen=True, slots=True)
class FoundModel:
    """What is trained, before its weights are loaded."""

    folder: Path
    tokeniser: Tokeniser

    @classmethod
    def find(cls, name: str, revision: str | None, template: str | None) -> FoundModel:
        """Raises ``OptionsError`` where there is no such model."""
        folder = find_model(name, revision)
        tokenizer = load_tokenizer(folder)
        return cls(folder, Tokeniser(tokenizer, template, eos_ids(folder, tokenizer)))


def name_model(model: str, revision: str | None, info: Info | None) -> tuple[str, str | None]:
    """The folder or hub id of what is to be trained, and its revision.

    Raises:
        OptionsError: none is given, or it is the service's and can't be found here.
    """
    if not model:
        raise OptionsError(f"--model: say which model to train ({SERVICE}: the one that the service of --url serves)")
    if model != SERVICE:
        return model, revision
    if info is None:
        raise OptionsError(f"--model {SERVICE} needs --url")
    if info.path and Path(info.path).is_dir():
        return info.path, None
    if "/" in info.model:
        return info.model, info.revision or None
    raise OptionsError(f"--model {SERVICE}: the service's model {info.model} is not on this machine; give its folder")


def find_model(model: str, revision: str | None) -> Path:
    """Its folder; fetched from the hub where it is neither a folder nor in the hub's cache.

    Raises:
        OptionsError: there is no such model.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise OptionsError(f"--model: {folder} holds no config.json, so it is not the folder of a model")
        return folder.resolve()
    if folder.is_absolute() or model.startswith((".", "~")):
        raise OptionsError(f"--model: there is no folder {folder}; give a model's folder, or its id on the hub")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=list(FILES)))
    except Exception as error:  # the hub's errors are many, and network stacks raise more
        said = first_line(error)
        raise OptionsError(f"--model: {model!r} is no folder here and can't be had from the hub: {said}") from error


def check_same(folder: Path, tokeniser: Tokeniser, info: Info) -> None:
    """Refuses to train another model on what the service says of its own.

    Raises:
        OptionsError: weights, configuration, tokenizer or template differ.
    """
    ours = fingerprint(folder)
    if info.fingerprint and ours != info.fingerprint:
        raise OptionsError(
            f"--model: {folder} ({ours}) is not what the service serves, {info.model} ({info.fingerprint}): give "
            f"--model {SERVICE}, or serve this one"
        )
    if info.template and tokeniser.template != info.template:
        raise OptionsError(
            f"--template: the service renders prompts by {info.template!r} and this run by {tokeniser.template!r}: "
            "give both the same --template"
        )


def eos_ids(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """Every token that ends a text of this model: the tokenizer's, and those that its configurations name."""
    config = _stated(folder / "config.json")
    configs = (config.get("text_config") or {}, config, _stated(folder / "generation_config.json"))
    ids: dict[int, None] = {}
    for stated in (tokenizer.eos_token_id, *(found.get("eos_token_id") for found in configs)):
        for id in stated if isinstance(stated, list) else [stated]:
            if isinstance(id, int) and id >= 0:  # some configurations write -1 for none
                ids[id] = None
    return tuple(ids)


def _stated(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return content if isinstance(content, dict) else {}
