"""What ``inward evaluate`` may be asked for."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

from inward.errors import SetupError
from inward.offline.options import add_layout, check_least
from inward.types import Kind
from inward_client.rows import AUTO

EPILOG = """examples:
  inward evaluate --head hybrid --pairs pairs.jsonl --html report.html
  inward evaluate --head heads/ranker --lists lists.jsonl --json
  inward evaluate --head guard --responses answers.jsonl --calibration others.jsonl --xstest xstest.jsonl --by category
  inward evaluate --compare heads/legend heads/whitened --pairs pairs.jsonl
  inward evaluate --cross-validate whitened --states states.safetensors

Pairs: prompt, chosen, rejected, or any layout that inward annotate reads. Lists: prompt, responses: [{"text", "safe"}].
Responses: prompt, response, safe; or, as XSTest has them, prompt, response, type, label (1 compliance, 2 refusal,
3 partial)."""
SOURCES = {
    "pairs": "labelled pairs",
    "lists": "lists of labelled responses",
    "responses": "single labelled responses",
    "states": "states saved by inward fit --save-states; needs no model",
}

IGNORED: Mapping[str, tuple[tuple[str, ...], str]] = {
    "compare": (("html", "calibration", "xstest", "by"), "only tells how far two heads are apart"),
    "cross_validate": (("calibration", "xstest"), "fixes the thresholds on the other folds"),
    "states": (
        ("calibration", "xstest", "by", "response_tokens"),
        "has no texts (--pairs, --lists and --responses have)",
    ),
}
"""Of an option those that it leaves nothing to do, and why."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options, but those that are settings."""
    add = parser.add_argument
    heads = parser.add_mutually_exclusive_group()
    heads.add_argument("--head", metavar="NAME", help="name of a head in the heads folder, or the folder of one")
    heads.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="two heads on the same rows, with a paired bootstrap of their difference",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    for name, about in SOURCES.items():
        source.add_argument(f"--{name}", type=Path, metavar="FILE", help=about)
    add(
        "--cross-validate",
        nargs="?",
        const="like",
        choices=["like", *get_args(Kind), "whitened"],
        metavar="KIND",
        help="judge heads that are refitted on the other folds: like --head, or of KIND",
    )
    _add_judging(parser)
    add("--json", action="store_true", help="the whole report as JSON on standard output")
    add("--html", type=Path, metavar="FILE", help="also write one self-contained HTML file with pictures")
    add("--baselines", action=argparse.BooleanOptionalAction, default=True, help="beside them (default: yes)")
    add("--layers", default="all", help="layers to read: all, head, or numbers such as 8,12,16 (default: %(default)s)")
    add(
        "--position",
        choices=["last", "eos", "mean"],
        help="without --head: where a response is read (hybrid: eos, else last)",
    )
    add("--folds", type=int, default=5, help="of every cross-validation (default: %(default)s)")
    add("--resamples", type=int, default=1000, help="of the bootstrap (default: %(default)s)")
    add("--seed", type=int, default=0, help="of folds, bootstrap and refits (default: %(default)s)")
    add("--response-tokens", type=int, metavar="N", help="judge by the first N tokens of each response")
    add("--limit", type=int, metavar="N", help="judge the first N rows only")
    add_layout(add)
    add("--parse-json", action="store_true", help="read messages that are stored as JSON text")


def _add_judging(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="rows of the same form whose safe responses fix the thresholds at 1 %% and 5 %% false positives (default: "
        "the other folds)",
    )
    add("--xstest", type=Path, metavar="FILE", help="XSTest's completions: false refusals at those thresholds")
    add("--by", metavar="COLUMN", help="also by source, category or whatever the rows have")


def check(args: argparse.Namespace) -> None:
    """What can be said of the options by themselves.

    Raises:
        SetupError: two that don't go together, or a number that is too small.
    """
    if args.head is None and args.compare is None and args.cross_validate in (None, "like"):
        raise SetupError(
            "name a head with --head, or a kind of head to refit with --cross-validate legend | whitened | hybrid | srr"
        )
    if args.compare and args.cross_validate:
        raise SetupError("--compare judges heads as they are: it does not go with --cross-validate")
    for option, (ignored, why) in IGNORED.items():
        if getattr(args, option) and (given := [name for name in ignored if getattr(args, name) is not None]):
            raise SetupError(f"--{_dashed(option)} {why}: it does not go with --{_dashed(given[0])}")
    if args.pairs is None and (args.layout != AUTO or args.columns):
        raise SetupError("--layout and --columns say how pairs are read: they go with --pairs")
    if args.folds < 3:
        raise SetupError(f"--folds {args.folds}: at least 3, since a layer is chosen on folds that are not judged")
    check_least(args, resamples=1, limit=1, response_tokens=1, seed=0)


def _dashed(name: str) -> str:
    return name.replace("_", "-")
