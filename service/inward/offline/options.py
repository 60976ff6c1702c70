"""What the options of several commands have in common."""

from __future__ import annotations

from argparse import Namespace

from inward.errors import SetupError


def check_least(args: Namespace, **least: int) -> None:
    """That numbers are no smaller than they may be; what was not given, or is no option here, is not looked at.

    Raises:
        SetupError: names the option.
    """
    for name, bound in least.items():
        value = getattr(args, name, None)
        if value is not None and value < bound:
            raise SetupError(f"--{name.replace('_', '-')} {value}: at least {bound}")
