"""``inward heads list | show | verify``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from inward.backbones.fingerprint import fingerprint
from inward.commands import COMMANDS
from inward.commands.options import add_settings, settings_of
from inward.errors import HeadError, NotFound
from inward.heads import store
from inward.processes.wiring import find_model, heads_folder, open_prompts


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("heads", help=COMMANDS["heads"], description="Looks at the heads of a model.")
    verbs = parser.add_subparsers(dest="verb", metavar="list|show|verify", required=True)
    listing = verbs.add_parser(
        "list", help="every version of every head", description="Lists every version of every head."
    )
    show = verbs.add_parser(
        "show", help="the manifest of a head", description="Prints the manifest of the active version of a head."
    )
    show.add_argument("name")
    verify = verbs.add_parser(
        "verify",
        help="load every head as the server would",
        description="Loads every version of every head as the server would, "
        "and says which ones it would refuse, and why. Exit status 1 if any.",
    )
    for verb in (listing, verify):
        verb.add_argument("--json", action="store_true", help="as JSON")
    for verb in (listing, show, verify):
        add_settings(verb, ("model", "revision", "heads", "template", "max_tokens"))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    settings = settings_of(args)
    model = find_model(settings)
    print_ = fingerprint(model.folder)
    folder = heads_folder(settings, print_)
    if folder is None or not folder.is_dir():
        raise NotFound("there is no heads folder: name one with --heads, or make one with `inward fit … --out DIR`")
    if args.verb == "show":
        return _show(args.name, folder)
    if args.verb == "list":
        return _list(store.find(folder), as_json=args.json)
    return _verify(folder, print_, open_prompts(settings, model, 2**31).template, as_json=args.json)


def _list(found: list[store.Found], *, as_json: bool) -> int:
    rows = [{"name": f.name, "kind": f.kind, "version": f.version, "path": str(f.path)} for f in found]
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        _print_table(["name", "kind", "version", "path"], [[str(v) for v in row.values()] for row in rows])
    return 0


def _show(name: str, folder: Path) -> int:
    path = store.active_path(folder, name)
    print((path / "head.json").read_text(encoding="utf-8"))
    return 0


def _verify(folder: Path, print_: str, template: str, *, as_json: bool) -> int:
    rows = []
    for _, path in store.folders(folder):
        row = {"path": str(path), "ok": True, "problem": None}
        try:
            store.load(path, fingerprint=print_, template=template)
        except HeadError as error:
            row |= {"ok": False, "problem": error.message}
        rows.append(row)
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        _print_table(["path", "verdict"], [[str(r["path"]), str(r["problem"] or "ok")] for r in rows])
    return 0 if all(r["ok"] for r in rows) else 1


def _print_table(columns: list[str], rows: list[list[str]]) -> None:
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    Console(width=None if Console().is_terminal else 200).print(table)
