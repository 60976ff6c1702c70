"""``inward fit``: texts or saved states in, a head out, and a report of what was found."""

from __future__ import annotations

import argparse
import shutil
import sys
from functools import partial

from rich.console import Console

from inward.commands.options import MODEL_SETTINGS, add_settings, cache_folder, head_folder, settings_of
from inward.errors import HeadError
from inward.heads import store
from inward.processes.wiring import opened_model


def add(parser: argparse.ArgumentParser) -> None:
    from inward.offline.fit.options import ABOUT, EPILOG, add_arguments

    parser.description = "Fits a head for a model, from JSONL or Parquet, or from states."
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


def run(args: argparse.Namespace) -> int:
    from inward.offline.fit.options import FEW_PROMPTS, USUAL, check
    from inward.offline.fit.run import fit

    args.name = args.name or args.out.name
    check(args)
    if args.kind in ("value", "guard"):
        args.of = head_folder(args, args.of)
    elif args.kind == "ensemble":
        args.parts = [head_folder(args, one) for one in args.parts]
    else:
        args.position = args.position or ("mean" if args.pool else "eos" if args.kind == "hybrid" else "last")
    cache = cache_folder(str(args.out.resolve()).strip("/").replace("/", "-"))
    head, report = fit(args, partial(opened_model, settings_of(args)), cache)
    console = Console(width=None if Console().is_terminal else 120)
    console.print(report)
    if args.kind in USUAL and (prompts := head.manifest.fit["prompts"]["count"]) < FEW_PROMPTS:
        print(f"warning: {prompts} prompts are too few to trust: {USUAL[args.kind]} are usual", file=sys.stderr)
    try:
        path = store.save(head, args.out, replace=args.replace)
    except HeadError as error:
        kept = store.save(head, cache / args.name, replace=True)
        raise HeadError(f"{error.message}; the head is in {kept} instead: move it") from error
    shutil.rmtree(cache, ignore_errors=True)
    console.print(f"saved {args.kind} head {head.ref.name!r} in {path}")
    return 0
