"""``inward completion``: what a shell needs to complete our words."""

from __future__ import annotations

import argparse

SHELLS = ("bash", "zsh", "tcsh")


def add(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Prints a script that lets a shell complete commands and options. It is made once; run it again "
        "after an update."
    )
    parser.epilog = "example: inward completion bash > ~/.local/share/bash-completion/completions/inward"
    parser.add_argument("shell", choices=SHELLS, help="which")


def run(args: argparse.Namespace) -> int:
    import shtab

    from inward.commands.parser import command_line

    print(shtab.complete(command_line(), shell=args.shell))
    return 0
