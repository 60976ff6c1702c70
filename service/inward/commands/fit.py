"""``inward fit``: texts or saved states in, a head out, and a report of what was found."""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
from functools import partial
from pathlib import Path

from rich.console import Console

from inward.commands import COMMANDS
from inward.commands.options import MODEL_SETTINGS, add_settings, head_folder, settings_of
from inward.errors import SetupError
from inward.heads import store
from inward.processes.wiring import opened_model, with_model


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from inward.offline.fit.options import ABOUT, EPILOG, add_arguments

    parser = commands.add_parser(
        "fit", help=COMMANDS["fit"], description="Fits a head for a model, from JSONL or Parquet, or from states."
    )
    kinds = parser.add_subparsers(dest="kind", metavar="|".join(ABOUT), required=True)
    for kind, about in ABOUT.items():
        one = kinds.add_parser(
            kind,
            help=about,
            description=f"Fits {about}.",
            epilog=EPILOG[kind],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_arguments(one, kind)
        add_settings(one, MODEL_SETTINGS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from inward.offline.fit.run import fit

    if args.out.exists() and not args.replace:
        raise SetupError(f"{args.out} exists already: choose another folder, or say --replace")
    args.name = args.name or args.out.name
    if args.kind in ("value", "guard"):
        args.of = head_folder(args, args.of)
    elif args.kind == "ensemble":
        args.parts = [head_folder(args, one) for one in args.parts]
    else:
        args.position = args.position or ("mean" if args.pool else "eos" if args.kind == "hybrid" else "last")
    cache = _cache_folder(args)
    settings = settings_of(args)
    opened = partial(opened_model, settings)
    head, report = fit(args, lambda use: asyncio.run(with_model(settings, use)), cache, opened)
    path = store.save(head, args.out, replace=args.replace)
    shutil.rmtree(cache, ignore_errors=True)
    console = Console(width=None if Console().is_terminal else 120)
    console.print(report)
    console.print(f"saved {args.kind} head {head.ref.name!r} in {path}")
    return 0


def _cache_folder(args: argparse.Namespace) -> Path:
    """Finished parts of a pass through the model: found again after an interruption, removed once the head is saved."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return base / "inward" / "states" / str(args.out.resolve()).strip("/").replace("/", "-")
