"""``inward evaluate``: how good is a head, beside everything that it has to beat."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inward.commands import COMMANDS
from inward.commands.options import MODEL_SETTINGS, add_settings, head_folder, settings_of

if TYPE_CHECKING:
    from inward.offline.evaluate.report import Rows


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from inward.offline.evaluate.options import EPILOG, add_arguments

    parser = commands.add_parser(
        "evaluate",
        help=COMMANDS["evaluate"],
        description="Judges a head on pairs, lists, labelled responses or saved states: every figure with its 95 % "
        "interval, resampled by prompt, beside length, mean difference, a logistic probe, TF-IDF and stable rank; and "
        "as a guard, at fixed false-positive rates.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    add_settings(parser, (*MODEL_SETTINGS, "heads"))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    # scikit-learn and matplotlib take their time to import: not for those who serve
    from inward.offline.evaluate.options import check
    from inward.offline.evaluate.run import compare_heads, evaluate
    from inward.offline.evaluate.tables import show, table

    check(args)
    folders = [head_folder(args, given) for given in args.compare or ([args.head] if args.head else [])]

    def opened(use: Any) -> Any:
        from inward.processes.wiring import with_model

        return asyncio.run(with_model(settings_of(args), use))

    if args.compare:
        from inward.offline.evaluate import compare

        differences, names = compare_heads(args, folders, opened, _cache_folder)
        if args.json:
            print(json.dumps(compare.report(differences, names), indent=2, allow_nan=False))
        else:
            show(compare.table(differences, names, "both on the same responses; 95 % intervals, paired over prompts"))
        return 0
    judgement, report = evaluate(args, folders, opened, _cache_folder)
    if args.html:
        from inward.offline.evaluate.page import page

        args.html.parent.mkdir(parents=True, exist_ok=True)
        args.html.write_text(page(judgement, report), encoding="utf-8")
    if args.json:
        print(json.dumps(report, indent=2, allow_nan=False))
    else:
        show(table(judgement, report))
    if args.html:
        print(f"wrote {args.html}", file=sys.stderr)
    return 0


def _cache_folder(rows: Rows) -> Path:
    """Finished parts of the pass through the model: found again after an interruption, removed once it is through."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return base / "inward" / "states" / f"evaluate-{rows.data.rpartition(':')[2]}"
