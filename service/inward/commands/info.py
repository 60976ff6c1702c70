"""``inward info``: what the settings come to, without loading the model."""

from __future__ import annotations

import argparse

from inward.commands.options import add_settings, settings_of


def add(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Prints what options and INWARD_* variables come to: where the model and the heads are, limits, "
        "fingerprint. Loads nothing."
    )
    parser.epilog = "example: inward info --json | jq .backbone.path"
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    add_settings(parser)


def run(args: argparse.Namespace) -> int:
    import json

    from inward.processes.wiring import describe

    described = describe(settings_of(args))
    if args.json:
        print(json.dumps(described, indent=2))
        return 0
    for section, value in described.items():
        if isinstance(value, dict):
            print(f"{section}:")
            for name, inner in value.items():
                print(f"  {name}: {inner}")
        else:
            print(f"{section}: {value}")
    return 0
