"""``inward evaluate``: how good is a head, beside everything that it has to beat."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from inward.commands.options import MODEL_SETTINGS, add_settings, cache_folder, head_folder, settings_of


def add(parser: argparse.ArgumentParser) -> None:
    from inward.offline.evaluate.options import EPILOG, add_arguments

    parser.description = (
        "Judges a head on pairs, lists, labelled responses or saved states: every figure with its 95 % "
        "interval, resampled by prompt, beside length, mean difference, a logistic probe, TF-IDF and stable rank; and "
        "as a guard, at fixed false-positive rates."
    )
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_arguments(parser)
    add_settings(parser, (*MODEL_SETTINGS, "heads"))


def run(args: argparse.Namespace) -> int:
    # scikit-learn and matplotlib take their time to import: not for those who serve
    from inward.offline.evaluate.options import check
    from inward.offline.evaluate.run import compare_heads, evaluate
    from inward.offline.evaluate.tables import show, table
    from inward.offline.places import check_page

    check(args)
    if args.html:
        check_page(args.html)
    folders = [head_folder(args, given) for given in args.compare or ([args.head] if args.head else [])]

    def opened() -> Any:
        from inward.processes.wiring import opened_model  # nor is a model needed where states are given

        return opened_model(settings_of(args))

    reading = (args, folders, opened, cache_folder)
    if args.compare:
        from inward.offline.evaluate import compare

        differences, names = compare_heads(*reading)
        if args.json:
            print(json.dumps(compare.report(differences, names), indent=2, allow_nan=False))
        else:
            show(compare.table(differences, names, "both on the same responses; 95 % intervals, paired over prompts"))
        return 0
    judgement, report = evaluate(*reading)
    if args.json:
        print(json.dumps(report, indent=2, allow_nan=False))
    else:
        show(table(judgement, report))
    if args.html:
        from inward.offline.evaluate.page import write

        write(args.html, judgement, report)
        print(f"wrote {args.html}", file=sys.stderr)
    return 0
