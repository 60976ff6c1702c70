"""From the name of a model to a folder with its files."""

from __future__ import annotations

from pathlib import Path

from inward.errors import SetupError

_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
"""Safetensors and text only: weights in pickled form are never fetched."""


def resolve(model: str, revision: str | None = None) -> Path:
    """The folder of ``model``: itself if it is one, else its snapshot from the Hugging Face hub (or from the hub's
    local cache).

    Raises:
        SetupError: neither a model folder nor a model that the hub gives us.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise SetupError(f"{folder} holds no config.json, so it is not the folder of a Hugging Face model")
        return folder.resolve()
    if folder.is_absolute() or model.startswith((".", "~")):
        raise SetupError(
            f"there is no folder {folder}; give an existing model folder or the id of a model on the Hugging Face hub"
        )
    return _snapshot(model, revision)


def _snapshot(model: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=_FILES))
    except GatedRepoError as error:
        raise SetupError(f"{model} is gated: accept its licence on the hub and set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise SetupError(f"{model} has no revision {revision!r} on the hub") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise SetupError(
            f"{model!r} is neither a folder here nor a model on the hub (a private one needs HF_TOKEN)"
        ) from error
    except LocalEntryNotFoundError as error:
        raise SetupError(
            f"the hub cannot be reached and {model} is not in its local cache: download it elsewhere and give its folder"
        ) from error
    except Exception as error:  # network stacks raise many things
        raise SetupError(f"{model} could not be fetched from the hub: {error}") from error
