"""``inward heads list | show | verify | push``."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from inward.backbones.fingerprint import fingerprint
from inward.commands import COMMANDS
from inward.commands.options import MODEL_SETTINGS, add_settings, settings_of
from inward.errors import HeadError, NotFound
from inward.heads import store
from inward.heads.card import card, headline
from inward.processes.wiring import find_model, heads_folder, open_prompts, with_model


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("heads", help=COMMANDS["heads"], description="Looks at the heads of a model.")
    verbs = parser.add_subparsers(dest="verb", metavar="list|show|verify|push", required=True)
    listing = verbs.add_parser(
        "list", help="every version of every head", description="Lists every version of every head."
    )
    show = verbs.add_parser(
        "show",
        help="a head's card",
        description="Prints what the manifest of a head's active version says, for people: how it was fitted, how good "
        "it is, and what its numbers mean.",
    )
    push = verbs.add_parser(
        "push",
        help="upload a head to the hub",
        description="Uploads the active version of a head (tensors, manifest and a card) to a repository of the hub, "
        "from where `--heads hf://ORG/REPO` takes it. Needs HF_TOKEN.",
    )
    for verb in (show, push):
        verb.add_argument("name")
    push.add_argument("repository", metavar="ORG/REPO", help="made if it isn't there; several heads may share one")
    push.add_argument("--private", action="store_true", help="make it a private one")
    push.add_argument("--branch", help="other than the main one")
    verify = verbs.add_parser(
        "verify",
        help="load every head as the server would",
        description="Loads every version of every head as the server would, "
        "and says which ones it would refuse, and why. Exit status 1 if any. With recent pairs also: how well the "
        "active ones still fit them.",
    )
    recent = verify.add_mutually_exclusive_group()
    recent.add_argument("--pairs", type=Path, metavar="FILE", help="recent labelled pairs, read through the model")
    recent.add_argument("--states", type=Path, metavar="FILE", help="the same as saved states")
    for verb in (listing, show, verify):
        verb.add_argument("--json", action="store_true", help="as JSON")
    for verb in (listing, show, verify, push):
        add_settings(verb, (*MODEL_SETTINGS, "heads"))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    settings = settings_of(args)
    model = find_model(settings)
    print_ = fingerprint(model.folder)
    folder = heads_folder(settings, print_)
    if folder is None or not folder.is_dir():
        raise NotFound("there is no heads folder: name one with --heads, or make one with `inward fit … --out DIR`")
    if args.verb == "show":
        return _show(args.name, folder, as_json=args.json)
    if args.verb == "push":
        return _push(args, folder)
    if args.verb == "list":
        return _list(store.find(folder), as_json=args.json)
    template = open_prompts(settings, model, 2**31).template
    drifts = _drifts(args, folder, print_, template) if args.pairs or args.states else {}
    return _verify(folder, print_, template, drifts, as_json=args.json)


def _list(found: list[store.Found], *, as_json: bool) -> int:
    rows = [{"name": f.name, "kind": f.kind, "version": f.version, "path": str(f.path)} for f in found]
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        told = [headline(store.load_manifest(f.path)) for f in found]
        cells = [
            [f.name, f.kind, str(f.version), *about.values(), str(f.path)] for f, about in zip(found, told, strict=True)
        ]
        _print_table(["name", "kind", "version", "accuracy", "base model", "fitted", "path"], cells)
    return 0


def _show(name: str, folder: Path, *, as_json: bool) -> int:
    path = store.active_path(folder, name)
    print((path / store.MANIFEST).read_text(encoding="utf-8") if as_json else card(store.load_manifest(path)))
    return 0


def _push(args: argparse.Namespace, folder: Path) -> int:
    from inward.heads.hub import HubHeads, push

    address = HubHeads.parse(f"hf://{args.repository}" + (f"@{args.branch}" if args.branch else ""))
    assert address is not None
    print(push(store.active_path(folder, args.name), address, private=args.private))
    return 0


def _drifts(args: argparse.Namespace, folder: Path, print_: str, template: str) -> dict[Path, dict[str, Any]]:
    """For the folder of each active head: how well it still fits, or why that cannot be told."""
    from inward.offline.fit.drift import of_pairs, of_states

    paths = [store.active_path(folder, name) for name in sorted({found.name for found in store.find(folder)})]
    heads = {path: store.load(path, fingerprint=print_, template=template) for path in paths}
    if args.states:
        return of_states(heads, args.states)
    return asyncio.run(
        with_model(settings_of(args), lambda backbone, prompts: of_pairs(backbone, prompts, heads, args.pairs))
    )


def _verify(folder: Path, print_: str, template: str, drifts: Mapping[Path, dict[str, Any]], *, as_json: bool) -> int:
    rows = []
    for _, path in store.folders(folder):
        row: dict[str, Any] = {"path": str(path), "ok": True, "problem": None}
        if path in drifts:
            row["drift"] = drifts[path]
        try:
            store.load(path, fingerprint=print_, template=template)
        except HeadError as error:
            row |= {"ok": False, "problem": error.message}
        rows.append(row)
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        columns = ["path", "verdict", *(["cosine with a refitted one", "pair accuracy", "refitted"] if drifts else [])]
        _print_table(columns, [[str(r["path"]), str(r["problem"] or "ok"), *_drift_cells(r, drifts)] for r in rows])
    return 0 if all(r["ok"] for r in rows) else 1


def _drift_cells(row: dict[str, Any], drifts: Mapping[Path, dict[str, Any]]) -> list[str]:
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
