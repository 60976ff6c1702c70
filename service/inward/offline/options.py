"""What the options of several commands have in common."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from inward.errors import SetupError
from inward_client.rows import AUTO, LAYOUTS

ADVICE = (
    "Name one with --layout, or say which columns to take: --columns prompt=question,chosen=answer_a,rejected=answer_b"
)
"""Where pairs have no layout that is recognised."""


def add_layout(add: Callable[..., Any]) -> None:
    """The options that say how pairs are read; ``add`` is a parser's or a group's ``add_argument``."""
    add("--layout", default=AUTO, metavar="NAME", help=f"of pairs: {', '.join(LAYOUTS)} (default: recognised)")
    add("--columns", default="", metavar="OURS=THEIRS,…", help="the dataset's names, such as prompt=question")


def columns(text: str) -> dict[str, str]:
    """What ``--columns`` says: a layout's column → the dataset's; an empty name says that there is none.

    Raises:
        SetupError: it says something else.
    """
    parts = [part.partition("=") for part in text.split(",") if part]
    for ours, sign, theirs in parts:
        if not ours or not sign:
            raise SetupError(f"--columns {ours}{sign}{theirs}: write OURS=THEIRS,… (OURS= where there is none)")
    return {ours: theirs for ours, _, theirs in parts}


def check_least(args: Namespace, **least: int) -> None:
    """That numbers are no smaller than they may be; what was not given, or is no option here, is not looked at.

    Raises:
        SetupError: names the option.
    """
    for name, bound in least.items():
        value = getattr(args, name, None)
        if value is not None and value < bound:
            raise SetupError(f"--{name.replace('_', '-')} {value}: at least {bound}")
