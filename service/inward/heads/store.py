"""Heads on disk: ``head.safetensors`` beside ``head.json``, checked on the way in, replaced atomically on the way out.

    <heads>/<name>/head.json            a head that was fitted or copied here (a bare folder is one version)
    <heads>/<name>/<version>/head.json  further versions, written by online updates; old ones of these are pruned
    <heads>/<name>/active.json          which version is served (without it: the highest), and the last update

Nothing here unpickles anything.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as safetensors_bytes

from inward.errors import HeadError, NotFound
from inward.files import replace_folder, write
from inward.heads.base import FORMAT_VERSION, Head, Manifest
from inward.heads.ensemble import EnsembleHead
from inward.heads.hybrid import HybridHead
from inward.heads.legend import LegendHead
from inward.heads.srr import SrrHead
from inward.heads.value import ValueHead
from inward.types import Floats, Kind

MANIFEST = "head.json"
TENSORS = "head.safetensors"
ACTIVE = "active.json"
Stamp = tuple[tuple[int, int, int], ...]


class HeadClass(Protocol):
    """What a kind of head offers to the store."""

    def from_tensors(self, manifest: Manifest, tensors: Mapping[str, Floats]) -> Head:
        """Raises ``HeadError`` on wrong names or shapes."""
        ...


KINDS: Mapping[Kind, HeadClass] = {
    "legend": LegendHead,
    "hybrid": HybridHead,
    "srr": SrrHead,
    "ensemble": EnsembleHead,
    "value": ValueHead,
}


class Found(NamedTuple):
    """A version of a head on disk. ``root`` is the head's own folder, directly below the heads folder."""

    name: str
    version: int
    kind: Kind
    path: Path
    root: Path


class State(NamedTuple):
    """``active.json``: what must outlive a restart beside the versions themselves."""

    version: int
    """The one that is served."""
    sequence: int = 0
    """Sequence number of the last online update."""
    updated: int | None = None
    """The version that it made."""


def save(head: Head, folder: Path, *, replace: bool = False) -> Path:
    """Writes a head so that ``folder`` is there complete or not at all. ``replace`` gives up all that is there, later
    versions too.

    Raises:
        HeadError: the folder is there already and ``replace`` is off, a tensor is not finite, or the folder can't be
            written.
    """
    folder = Path(folder)
    tensors = {name: np.ascontiguousarray(tensor, dtype=np.float32) for name, tensor in head.tensors().items()}
    _check_finite(tensors, f"head {head.manifest.name!r}")
    if folder.exists() and not replace:
        raise HeadError(f"{folder} exists already: choose another folder or version, or remove it")
    files = {TENSORS: safetensors_bytes(tensors), MANIFEST: _written(head.manifest)}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            fresh.chmod(0o755)  # mkdtemp's folders are for the owner only
            for name, content in files.items():
                write(fresh / name, content)
            replace_folder(fresh, folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    except OSError as error:
        raise HeadError(f"can't write the head to {folder}: {error.strerror or error}") from error
    return folder


def load(
    folder: Path,
    *,
    fingerprint: str | None = None,
    template: str | None = None,
    depth: int | None = None,
    width: int | None = None,
    final_norm: bool = True,
    backbone: str = "the loaded backbone",
) -> Head:
    """Reads a head and refuses one that would give wrong numbers. What is None is not compared.

    Args:
        folder: holds ``head.json`` and ``head.safetensors``.
        fingerprint: of the backbone that is to serve it; ``backbone`` is its name, for the message.
        template: how prompts are rendered there.
        depth: blocks of the backbone.
        width: of its residual stream.
        final_norm: whether its last layer can be read after its final norm.

    Raises:
        HeadError: says what is wrong with which file and what to do.
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    if fingerprint is not None and manifest.backbone.fingerprint != fingerprint:
        raise HeadError(
            f"head {manifest.name!r} in {folder} was fitted on {manifest.backbone.name} "
            f"({manifest.backbone.fingerprint}), "
            f"but the backbone is {backbone} ({fingerprint}): serve that backbone, or refit with: "
            f"inward fit {manifest.kind} --out {folder}"
        )
    if template is not None and manifest.template != template:
        raise HeadError(
            f"head {manifest.name!r} in {folder} was fitted with the template {manifest.template!r}, but prompts are "
            "rendered with "
            f"{template!r}: set the template that it was fitted with, or refit with: inward fit {manifest.kind} --out "
            f"{folder}"
        )
    if not manifest.layers or min(manifest.layers) < 0 or (depth is not None and max(manifest.layers) > depth):
        raise HeadError(
            f"head {manifest.name!r} in {folder} reads layers {list(manifest.layers)}, "
            f"but the backbone has {'at least 0' if depth is None else f'0 to {depth}'}: fit it again on this backbone"
        )
    head = KINDS[manifest.kind].from_tensors(manifest, _load_tensors(folder))
    _check_final_norm(head, folder, depth, final_norm, backbone)
    widths = {tap.weight_DK.shape[0] for tap in head.readout.taps if tap.weight_DK is not None}
    if width is not None and widths != {width}:
        raise HeadError(
            f"head {manifest.name!r} in {folder} reads states of width {sorted(widths)}, but the backbone's are "
            f"{width} wide"
        )
    return head


def _check_final_norm(head: Head, folder: Path, depth: int | None, there: bool, backbone: str) -> None:
    normed = {tap.layer for tap in head.readout.taps if tap.final_norm}
    if normed and not there:
        raise HeadError(
            f"head {head.manifest.name!r} in {folder} reads after the final norm, which {backbone} does not have in "
            "the "
            "width of its stream: fit it again on the last layer before it"
        )
    if depth is not None and normed - {depth}:
        raise HeadError(
            f"head {head.manifest.name!r} in {folder} says final_norm, but reads layer {min(normed)}: only the last "
            f"layer, {depth}, has a final norm; fit it again on that layer, or without final_norm"
        )


def load_manifest(folder: Path) -> Manifest:
    """Reads ``head.json``.

    Raises:
        HeadError: it is missing, not JSON, of a future format, or a field does not validate.
    """
    path = Path(folder) / MANIFEST
    try:
        fields = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise HeadError(f"{folder} is not a head: it has no {MANIFEST}") from None
    except (OSError, ValueError) as error:
        raise HeadError(f"{path} can't be read as JSON ({error}): copy the head again or fit it again") from error
    version = fields.get("format_version", FORMAT_VERSION) if isinstance(fields, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise HeadError(
            f"{path} has format_version {version}, this Inward reads up to {FORMAT_VERSION}: upgrade Inward, or fit "
            "again"
        )
    try:
        return Manifest.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the whole file"
        raise HeadError(
            f"{path}: {field}: {first['msg']} ({error.error_count()} such errors); correct it or fit the head again"
        ) from None


def find(heads_dir: Path, *, read: Callable[[Path], Manifest] = load_manifest) -> list[Found]:
    """Every version of every head below ``heads_dir``, by name and version. It may also be the folder of a single head.

    Args:
        read: gives the manifest in a folder; a caller may know it already.

    Raises:
        HeadError: the folder does not exist, a manifest can't be read, or two folders claim the same head.
    """
    found: dict[tuple[str, int], Found] = {}
    roots: dict[str, Path] = {}
    for root, path in folders(heads_dir):
        try:
            manifest = read(path)
        except HeadError:
            if not path.exists():  # another process has just removed this version
                continue
            raise
        one = Found(manifest.name, manifest.version, manifest.kind, path, root)
        other = found.setdefault(one[:2], one)
        if other is not one or roots.setdefault(one.name, root) != root:
            claimed = other.path if other is not one else roots[one.name]
            raise HeadError(
                f"{path} and {claimed} both hold head {one.name!r} (version {one.version}): rename or remove one"
            )
    return [found[key] for key in sorted(found)]


def remove(folder: Path) -> None:
    """Takes a version away at once; one that can't be removed stays."""
    gone = folder.with_name(f".{folder.name}-gone")
    try:
        folder.rename(gone)
    except OSError:
        return
    shutil.rmtree(gone, ignore_errors=True)


def stamp(folder: Path) -> Stamp:
    """What differs once one of a head's files was written again."""
    files = [folder / MANIFEST, folder / TENSORS]
    about = [file.stat() for file in files if file.is_file()]
    return tuple((one.st_mtime_ns, one.st_size, one.st_ino) for one in about)


def folders(heads_dir: Path) -> list[tuple[Path, Path]]:
    """(root, folder) of everything below ``heads_dir`` that claims to be a head, readable or not.

    Raises:
        HeadError: the folder does not exist.
    """
    heads_dir = Path(heads_dir)
    if not heads_dir.is_dir():
        raise HeadError(f"the heads folder {heads_dir} does not exist: create it, or name another with --heads")
    below = [p for p in sorted(heads_dir.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    return [
        (root, path)
        for root in ([heads_dir] if holds_head(heads_dir) else below)
        for path in filter(holds_head, [root, *sorted(p for p in root.iterdir() if p.is_dir() and p.name.isdigit())])
    ]


def holds_head(folder: Path) -> bool:
    """Whether a folder claims to be a version of a head."""
    return (folder / MANIFEST).is_file() or (folder / TENSORS).is_file()


def active_path(heads_dir: Path, name: str) -> Path:
    """Folder of the version of a head that is served.

    Raises:
        NotFound: no head of that name; lists those that exist.
        HeadError: see ``find`` and ``read_state``.
    """
    everything = find(heads_dir)
    mine = {found.version: found for found in everything if found.name == name}
    if not mine:
        raise NotFound(
            f"there is no head {name!r} in {heads_dir}; there are: "
            f"{', '.join(sorted({f.name for f in everything})) or 'none'}"
        )
    root = next(iter(mine.values())).root
    return mine[read_state(root, mine.keys()).version].path


def read_state(root: Path, versions: Collection[int]) -> State:
    """Reads ``active.json``; without one, the highest of ``versions`` is served.

    Raises:
        HeadError: it can't be read, or names a version that is not there.
    """
    path = root / ACTIVE
    if not path.exists():
        return State(max(versions))
    try:
        fields = json.loads(path.read_bytes())
        updated = fields.get("updated")
        state = State(int(fields["version"]), int(fields.get("sequence", 0)), None if updated is None else int(updated))
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise HeadError(
            f'{path} is damaged ({error!r}): write {{"version": <the version to serve>}} into it'
        ) from error
    if state.version not in versions:
        there = ", ".join(map(str, sorted(versions)))
        raise HeadError(
            f"{path} names version {state.version} as the one to serve, but there are only: {there}; correct it"
        )
    return state


def write_state(root: Path, state: State) -> None:
    """Replaces ``active.json`` at once.

    Raises:
        HeadError: the folder can't be written.
    """
    try:
        write(root / ACTIVE, json.dumps(state._asdict()).encode() + b"\n")
    except OSError as error:
        raise HeadError(f"can't write {root / ACTIVE}: {error.strerror or error}") from error


def _written(manifest: Manifest) -> bytes:
    """``head.json``; without ``pool`` where there is none, so that older versions read it."""
    unsaid = {"pool"} if manifest.pool is None else None
    return (manifest.model_dump_json(indent=2, exclude=unsaid) + "\n").encode()


def _load_tensors(folder: Path) -> dict[str, Floats]:
    path = folder / TENSORS
    if not path.is_file():
        raise HeadError(f"{folder} has no {TENSORS}: copy the head again or fit it again")
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise HeadError(f"{path} is damaged or cut short ({error}): copy the head again or fit it again") from error
    if strange := [f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if tensor.dtype.kind != "f"]:
        raise HeadError(f"{path}: not floating point: {', '.join(strange)}; fit the head again")
    with np.errstate(over="ignore"):  # what float32 can't hold becomes infinite, and is refused as such
        tensors = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    _check_finite(tensors, str(path))
    return tensors


def _check_finite(tensors: Mapping[str, Floats], where: str) -> None:
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise HeadError(f"{where}: tensor {name!r} has NaN or infinite entries: fit the head again")
