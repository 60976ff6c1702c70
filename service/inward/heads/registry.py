"""The heads that are served: which versions exist, and which one of each is active.

Readers take one immutable ``Snapshot`` and keep it for a batch; writers build the next one under a lock and swap the
reference. What changes is on disk before it is served, so a restart finds the same versions active and knows which
online update was the last. Of the versions that online updates made the newest are kept, and reading the folder again
reads only what has changed, so neither grows with the number of updates.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from inward import metrics
from inward.errors import Conflict, HeadError, NotFound
from inward.heads import store
from inward.heads.base import Head, Manifest
from inward.heads.value import calibrated_for, predicts
from inward.types import BackboneInfo, HeadRef, Kind

KINDS: tuple[Kind, ...] = ("legend", "hybrid", "srr", "ensemble", "value")
KEPT_UPDATES = 20
"""Versions made by online updates that are kept on disk, to roll back to; the oldest go first. What was fitted
stays."""


@dataclass(frozen=True, slots=True)
class LoadedHead:
    """One head: its active version, and what else there is of it."""

    head: Head
    paths: Mapping[int, Path]
    """Folder of each version on disk."""
    root: Path | None
    """The head's own folder; None for a head that is only in memory."""
    sequence: int = 0
    """Sequence number of the last online update; the next must be one more."""
    updated: int | None = None
    """Version that the last online update made."""

    def describe(self) -> dict[str, Any]:
        """What ``GET /heads/{name}`` and ``inward heads show`` tell."""
        manifest = self.head.manifest
        path = self.paths.get(manifest.version)
        return {
            "name": manifest.name,
            "kind": manifest.kind,
            "version": manifest.version,
            "versions": sorted(self.paths),
            "sequence": self.sequence,
            "path": str(path) if path else None,
            "created": manifest.created,
            "backbone": manifest.backbone.model_dump(),
            "layers": list(manifest.layers),
            "position": manifest.position,
            "pool": manifest.pool.model_dump() if manifest.pool else None,
            "template": manifest.template,
            "calibration": manifest.calibration,
            "fit": _told(manifest.fit),
        }


def _told(fit: dict[str, Any]) -> dict[str, Any]:
    """Without what tells which prompts were in the fit: it is long, and for those who have the head."""
    prompts = fit.get("prompts")
    return fit | {"prompts": {"count": prompts.get("count")}} if isinstance(prompts, dict) else fit


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The active version of every head at one moment."""

    loaded: Mapping[str, LoadedHead]

    @property
    def heads(self) -> dict[str, Head]:
        """By name, in the order of names."""
        return {name: loaded.head for name, loaded in self.loaded.items()}

    def get(self, name: str) -> LoadedHead:
        """Raises ``NotFound``, which lists what is loaded."""
        return self.loaded[choose(self._refs(), name).name]

    def resolve(self, name: str | None = None, kinds: Sequence[Kind] = KINDS) -> Head:
        """The head of that name; without one, the first head of the first of ``kinds`` that has any.

        Of several heads of a kind, the one named like the kind is the default, else the first by name.

        Raises:
            NotFound: no such head, or it is of no kind that will do here; lists what is loaded.
        """
        return self.loaded[choose(self._refs(), name, kinds).name].head

    def value_of(self, name: str) -> Head | None:
        """The value head that predicts the finished reward of head ``name``; of several one that is calibrated for its
        active version, and the first by name.
        """
        of = self.resolve(name).manifest
        heads = [one.head for one in self.loaded.values() if one.head.ref.kind == "value"]
        fitted = [head for head in heads if predicts(head.manifest, of)]
        return min(fitted, key=lambda head: not calibrated_for(head.manifest, of), default=None)

    def _refs(self) -> dict[str, HeadRef]:
        return {name: loaded.head.ref for name, loaded in self.loaded.items()}


def choose(refs: Mapping[str, HeadRef], name: str | None = None, kinds: Sequence[Kind] = KINDS) -> HeadRef:
    """Which of ``refs`` (by name) is meant: ``Snapshot.resolve`` without the heads, for processes that only know of
    them.

    Raises:
        NotFound: no such head, or it is of no kind that will do here; lists what is loaded.
    """
    if name is not None:
        if name not in refs:
            raise NotFound(f"there is no head {name!r}; {_inventory(refs)}", param="head")
        if refs[name].kind not in kinds:
            wanted = " or ".join(kinds)
            raise NotFound(
                f"head {name!r} is a {refs[name].kind} head, but {wanted} is needed here; {_inventory(refs)}",
                param="head",
            )
        return refs[name]
    for kind in kinds:
        of_kind = [ref for ref in refs.values() if ref.kind == kind]
        if of_kind:
            return min(of_kind, key=lambda ref: (ref.name != kind, ref.name))
    raise NotFound(f"no {' or '.join(kinds)} head is loaded; {_inventory(refs)}", param="head")


def _inventory(refs: Mapping[str, HeadRef]) -> str:
    names = ", ".join(f"{name} ({ref.kind})" for name, ref in refs.items())
    return (
        f"loaded: {names}"
        if names
        else "no head is loaded: fit one with inward fit, or name another folder with --heads"
    )


class Registry:
    """All versions of all heads below one folder. Safe to use from several threads; writes touch the disk.

    Heads given without a folder live in memory only: they can be served, but neither updated nor rolled back.
    """

    def __init__(self, heads: Iterable[Head] = ()) -> None:
        loaded = {head.ref.name: LoadedHead(head, {}, None) for head in heads}
        self._snapshot = Snapshot(MappingProxyType(dict(sorted(loaded.items()))))
        self._writing = threading.Lock()
        self._folder: Path | None = None
        self._info: BackboneInfo | None = None
        self._template: str | None = None
        self._manifests: dict[Path, tuple[store.Stamp, Manifest]] = {}
        self._heads: dict[Path, tuple[store.Stamp, Head]] = {}  # those that are active

    @classmethod
    def open(cls, folder: Path | None, *, info: BackboneInfo | None = None, template: str | None = None) -> Self:
        """Loads the active version of every head.

        Args:
            folder: see ``store``; None is a registry without heads.
            info: the backbone that the heads must have been fitted on; None checks nothing (for listing without a
                backbone).
            template: how prompts are rendered for it.

        Raises:
            HeadError: a head that is active is refused; says why and what to do.
        """
        registry = cls()
        registry._folder, registry._info, registry._template = folder, info, template
        registry.reload()
        return registry

    def snapshot(self) -> Snapshot:
        """What is active now; it never changes under the reader."""
        return self._snapshot

    def resolve(self, name: str | None = None, kinds: Sequence[Kind] = KINDS) -> Head:
        """``Snapshot.resolve`` of this moment."""
        return self._snapshot.resolve(name, kinds)

    def names(self) -> list[str]:
        """Names of the loaded heads."""
        return list(self._snapshot.loaded)

    def listing(self) -> list[dict[str, Any]]:
        """Every head, by name, as ``GET /heads`` and ``inward heads list --json`` tell it."""
        return [loaded.describe() for loaded in self._snapshot.loaded.values()]

    def show(self, name: str) -> dict[str, Any]:
        """One head.

        Raises:
            NotFound: lists what is loaded.
        """
        return self._snapshot.get(name).describe()

    def versions(self, name: str) -> list[int]:
        """Version numbers of a head, ascending.

        Raises:
            NotFound: lists what is loaded.
        """
        return sorted(self._snapshot.get(name).paths)

    def reload(self) -> None:
        """Reads what has changed in the folder; what is served changes only if all of it can be loaded.

        Raises:
            HeadError: an active head is refused.
        """
        if self._folder is None:
            return
        with self._writing:
            roots: dict[str, Path] = {}
            paths: dict[str, dict[int, Path]] = {}
            for found in store.find(self._folder, read=self._manifest):
                roots[found.name] = found.root
                paths.setdefault(found.name, {})[found.version] = found.path
            there = {path for versions in paths.values() for path in versions.values()}
            self._manifests = {path: known for path, known in self._manifests.items() if path in there}
            loaded = {name: self._open(roots[name], paths[name]) for name in sorted(paths)}
            active = {one.paths[one.head.ref.version] for one in loaded.values()}
            self._heads = {path: known for path, known in self._heads.items() if path in active}
            self._swap(loaded)

    def activate(self, name: str, version: int) -> Head:
        """Switches to a version; it stays active after a restart.

        Raises:
            NotFound: no such head or version; lists those that exist.
            HeadError: that version can't be loaded; the active one stays.
        """
        with self._writing:
            loaded = self._snapshot.get(name)
            if loaded.root is None and version == loaded.head.ref.version:
                return loaded.head
            if version not in loaded.paths:
                there = ", ".join(map(str, sorted(loaded.paths))) or str(loaded.head.ref.version)
                raise NotFound(f"head {name!r} has no version {version}; there are: {there}", param="version")
            return self._serve(replace(loaded, head=self._load(loaded.paths[version])))

    def applied(self, name: str, sequence: int) -> Head | None:
        """Looks at an update's sequence number before anything is computed for it.

        Returns:
            None if this update is the next one; the head that it made if it is a repeat of the last one.

        Raises:
            NotFound: no such head.
            Conflict: it is older or newer than that; says what is expected.
        """
        loaded = self._snapshot.get(name)
        if sequence == loaded.sequence + 1:
            return None
        if sequence == loaded.sequence and loaded.updated is not None:
            active = loaded.head
            return active if active.ref.version == loaded.updated else self._load(loaded.paths[loaded.updated])
        last = (
            f"{loaded.sequence} was applied last, send it again only to repeat it"
            if loaded.sequence
            else "none was applied yet"
        )
        raise Conflict(
            f"head {name!r} expects update sequence {loaded.sequence + 1}, not {sequence} ({last})", param="sequence"
        )

    def add_version(self, head: Head, *, sequence: int | None = None) -> Head:
        """Stores a new version of a loaded head and switches to it. Its version number is the next free one, whatever
        ``head`` says.

        Args:
            head: has the name of a loaded head.
            sequence: of an online update. A repeat of the last one changes nothing and gives back what that one made.

        Raises:
            NotFound: no head of that name is loaded.
            Conflict: a stale sequence number, or a gap; says what is expected.
            HeadError: the head lives in memory only, or the folder can't be written.
        """
        with self._writing:
            loaded = self._snapshot.get(head.manifest.name)
            if sequence is not None and (repeated := self.applied(head.manifest.name, sequence)):
                return repeated
            if loaded.root is None:
                raise HeadError(f"head {head.manifest.name!r} lives in memory only and has no folder for a new version")
            self._keep(loaded)  # so that a version written before a crash is there after it, but not active
            version = max(loaded.paths) + 1
            manifest = head.manifest.model_copy(update={"version": version})
            head = store.KINDS[manifest.kind].from_tensors(manifest, head.tensors())
            path = store.save(head, loaded.root / str(version))
            self._heads[path] = (store.stamp(path), head)
            loaded = replace(loaded, head=head, paths=MappingProxyType({**loaded.paths, version: path}))
            if sequence is not None:
                loaded = replace(loaded, sequence=sequence, updated=version)
                metrics.HEAD_UPDATES_TOTAL.labels(head=loaded.head.ref.name).inc()
            served = self._serve(loaded)
            self._prune(loaded)
            return served

    def _prune(self, loaded: LoadedHead) -> None:
        """Removes the oldest versions that online updates made, but none that is served or would be given again."""
        made = [version for version, path in sorted(loaded.paths.items()) if _made_online(self._manifest(path))]
        needed = {loaded.head.ref.version, loaded.updated}
        old = [version for version in made[:-KEPT_UPDATES] if version not in needed]
        if not old:
            return
        for version in old:
            store.remove(loaded.paths[version])
        kept = {version: path for version, path in loaded.paths.items() if version not in old}
        pruned = replace(loaded, paths=MappingProxyType(kept))
        self._swap({**self._snapshot.loaded, loaded.head.ref.name: pruned})

    def _serve(self, loaded: LoadedHead) -> Head:
        self._keep(loaded)
        self._swap({**self._snapshot.loaded, loaded.head.ref.name: loaded})
        return loaded.head

    def _manifest(self, path: Path) -> Manifest:
        """The manifest in a folder, read again only if a file there has changed."""
        stamp = store.stamp(path)
        known = self._manifests.get(path)
        if known is None or known[0] != stamp:
            known = self._manifests[path] = (stamp, store.load_manifest(path))
        return known[1]

    def _swap(self, loaded: Mapping[str, LoadedHead]) -> None:
        self._snapshot = Snapshot(MappingProxyType(dict(loaded)))
        metrics.HEAD_INFO.clear()
        for name, one in loaded.items():
            metrics.begin(name)
            metrics.serving(name, str(one.head.ref.version))
            for version in {*sorted(one.paths)[-metrics.KEPT_VERSIONS :], one.head.ref.version}:
                active = str(version == one.head.ref.version).lower()
                metrics.HEAD_INFO.labels(head=name, kind=one.head.ref.kind, version=str(version), active=active).set(1)

    @staticmethod
    def _keep(loaded: LoadedHead) -> None:
        if loaded.root is not None:
            store.write_state(loaded.root, store.State(loaded.head.ref.version, loaded.sequence, loaded.updated))

    def _open(self, root: Path, paths: dict[int, Path]) -> LoadedHead:
        state = store.read_state(root, paths.keys())
        path = paths[state.version]
        stamp = store.stamp(path)
        known = self._heads.get(path)
        if known is None or known[0] != stamp:
            known = self._heads[path] = (stamp, self._load(path))
        return LoadedHead(known[1], MappingProxyType(paths), root, state.sequence, state.updated)

    def _load(self, path: Path) -> Head:
        if self._info is None:
            return store.load(path, template=self._template)
        return store.load(
            path,
            fingerprint=self._info.fingerprint,
            template=self._template,
            depth=self._info.layers,
            width=self._info.width,
            final_norm=self._info.final_norm,
            backbone=self._info.name,
        )


def _made_online(manifest: Manifest) -> bool:
    return bool(manifest.fit.get("online_steps"))
