"""Heads in a repository of the hub: ``hf://org/repo@revision``. Only manifests and tensors are fetched, and nothing is
unpickled; that a head belongs to the model that is served, its fingerprint says as ever.

    head.json  head.safetensors                  one head, or
    <name>/head.json  <name>/head.safetensors    several
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from inward.errors import InwardError, SetupError
from inward.files import whole_folder
from inward.heads.base import Manifest
from inward.heads.card import card
from inward.heads.store import MANIFEST, TENSORS, load_manifest

SCHEME = "hf:"
_ADDRESS = re.compile(r"hf:/{1,2}([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")  # a Path keeps one of two slashes
_FILES = [MANIFEST, TENSORS, f"*/{MANIFEST}", f"*/{TENSORS}"]
_CARD = "README.md"


@dataclass(frozen=True, slots=True)
class HubHeads:
    """Where heads are kept on the hub."""

    repository: str
    revision: str | None = None
    """Branch, tag or commit; None: the main branch."""

    @classmethod
    def parse(cls, address: str | Path) -> Self | None:
        """None for what is a folder.

        Raises:
            SetupError: it begins as an address of the hub does, and is none.
        """
        if not str(address).startswith(SCHEME):
            return None
        if (match := _ADDRESS.fullmatch(str(address))) is None:
            raise SetupError(f"{address} is no repository of heads: write hf://ORG/REPO or hf://ORG/REPO@REVISION")
        return cls(match[1], match[2])


def fetch(address: HubHeads, state: Path) -> Path:
    """A heads folder below ``state`` with the heads of that commit. It is this machine's own: what online updates add
    stays in it.

    Raises:
        SetupError: the hub can't be reached, or has no such repository, revision or heads.
    """
    import huggingface_hub

    with _hub(address):
        fetched = Path(
            huggingface_hub.snapshot_download(address.repository, revision=address.revision, allow_patterns=_FILES)
        )
    found = sorted(path.parent for pattern in (MANIFEST, f"*/{MANIFEST}") for path in fetched.glob(pattern))
    if not found:
        raise SetupError(f"{address.repository} has no heads: none of its folders holds a {MANIFEST}")
    folder = state / f"{address.repository.replace('/', '--')}-{fetched.name[:12]}"
    if not folder.is_dir():
        with whole_folder(folder) as fresh:
            for head in found:
                place = fresh / load_manifest(head).name
                place.mkdir()
                for name in (MANIFEST, TENSORS):
                    shutil.copyfile(head / name, place / name)
    return folder


def push(path: Path, address: HubHeads, *, private: bool = False) -> str:
    """Uploads the version of a head in the folder ``path``, with a model card, and gives the address of the commit.

    The repository is made if it isn't there. Its own README is written with the first head and then left alone.

    Raises:
        SetupError: the hub can't be reached, or refuses.
    """
    import huggingface_hub

    manifest = load_manifest(path)
    text = _front_matter(manifest) + card(manifest, at=address.repository)
    with _hub(address):
        hub = huggingface_hub.HfApi()
        hub.create_repo(address.repository, private=private, exist_ok=True)
        names = [manifest.name + "/" + name for name in (MANIFEST, TENSORS)]
        operations = [huggingface_hub.CommitOperationAdd(name, path / Path(name).name) for name in names] + [
            huggingface_hub.CommitOperationAdd(f"{manifest.name}/{_CARD}", text.encode())
        ]
        if not hub.file_exists(address.repository, _CARD):
            operations.append(huggingface_hub.CommitOperationAdd(_CARD, text.encode()))
        commit = hub.create_commit(
            address.repository,
            operations,
            commit_message=f"{manifest.name}, version {manifest.version}",
            revision=address.revision,
        )
    return f"hf://{address.repository}@{commit.oid}"


def _front_matter(manifest: Manifest) -> str:
    """What the hub reads at the top of a card."""
    return f"---\nlibrary_name: inward\ntags:\n- inward\n- reward-model\n- {manifest.kind}\n---\n\n"


@contextmanager
def _hub(address: HubHeads) -> Iterator[None]:
    """The hub's errors as ours."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = address.repository
    try:
        yield
    except InwardError:
        raise
    except RevisionNotFoundError as error:
        raise SetupError(f"{name} has no revision {address.revision!r} on the hub") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise SetupError(f"{name} is no repository on the hub (a private one needs HF_TOKEN)") from error
    except LocalEntryNotFoundError as error:
        raise SetupError(
            f"the hub cannot be reached and {name} is not in its local cache: download it elsewhere, give its folder"
        ) from error
    except HfHubHTTPError as error:
        told = str(error).split("\n")[0]
        raise SetupError(f"the hub refuses {name}: {told} (writing needs HF_TOKEN)") from error
    except Exception as error:  # network stacks raise many things
        raise SetupError(f"{name} could not be reached on the hub: {error}") from error
