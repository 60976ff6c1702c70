"""What ``inward heads`` does with the heads in a folder: list, show, push and verify them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from inward.errors import HeadError
from inward.heads import store
from inward.heads.card import card, headline
from inward.offline.model import OpenModel, with_model

Drifts = Mapping[Path, dict[str, Any]]
"""For the folder of each active head: how well it still fits, or why that cannot be told."""


def show_all(folder: Path, *, as_json: bool) -> int:
    """Prints every version of every head."""
    found = store.find(folder)
    rows = [{"name": f.name, "kind": f.kind, "version": f.version, "path": str(f.path)} for f in found]
    if as_json:
        print(json.dumps(rows, indent=2))
        return 0
    told = [headline(store.load_manifest(f.path)) for f in found]
    cells = [
        [f.name, f.kind, str(f.version), *about.values(), str(f.path)] for f, about in zip(found, told, strict=True)
    ]
    _print_table(["name", "kind", "version", "accuracy", "base model", "fitted", "path"], cells)
    return 0


def show(folder: Path, name: str, *, as_json: bool) -> int:
    """Prints the card of a head's active version."""
    path = store.active_path(folder, name)
    print((path / store.MANIFEST).read_text(encoding="utf-8") if as_json else card(store.load_manifest(path)))
    return 0


def push(folder: Path, name: str, repository: str, branch: str | None, *, private: bool) -> int:
    """Uploads a head's active version to the hub, and prints where it is."""
    from inward.heads.hub import HubHeads
    from inward.heads.hub import push as upload

    address = HubHeads.parse(f"hf://{repository}" + (f"@{branch}" if branch else ""))
    assert address is not None
    print(upload(store.active_path(folder, name), address, private=private))
    return 0


def drifts(
    folder: Path,
    fingerprint: str,
    template: str,
    *,
    states: Path | None,
    pairs: Path | None,
    opened: OpenModel,
) -> Drifts:
    """How well the active heads fit recent pairs, given as saved states or read through the model; none without."""
    if pairs is None and states is None:
        return {}
    from inward.offline.fit.drift import of_pairs, of_states

    paths = [store.active_path(folder, name) for name in sorted({found.name for found in store.find(folder)})]
    heads = {path: store.load(path, fingerprint=fingerprint, template=template) for path in paths}
    if states is not None:
        return of_states(heads, states)
    assert pairs is not None
    return with_model(opened, lambda backbone, prompts: of_pairs(backbone, prompts, heads, pairs))


def verify(folder: Path, fingerprint: str, template: str, drifts: Drifts, *, as_json: bool) -> int:
    """Loads every version of every head as the server would, and prints which it would refuse; 1 if any."""
    rows = []
    for _, path in store.folders(folder):
        row: dict[str, Any] = {"path": str(path), "ok": True, "problem": None}
        if path in drifts:
            row["drift"] = drifts[path]
        try:
            store.load(path, fingerprint=fingerprint, template=template)
        except HeadError as error:
            row |= {"ok": False, "problem": error.message}
        rows.append(row)
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        columns = ["path", "verdict", *(["cosine with a refitted one", "pair accuracy", "refitted"] if drifts else [])]
        _print_table(columns, [[str(r["path"]), str(r["problem"] or "ok"), *_drift_cells(r, drifts)] for r in rows])
    return 0 if all(r["ok"] for r in rows) else 1


def _drift_cells(row: dict[str, Any], drifts: Drifts) -> list[str]:
    if not drifts:
        return []
    drift = row.get("drift", {})
    if "cosine" not in drift:
        return [drift.get("why", "not active"), "", ""]
    return [f"{drift[name]:.3f}" for name in ("cosine", "accuracy", "refitted_accuracy")]


def _print_table(columns: list[str], rows: list[list[str]]) -> None:
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    Console(width=None if Console().is_terminal else 200).print(table)
