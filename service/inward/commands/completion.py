"""``inward completion``: what a shell needs to complete our words."""

from __future__ import annotations

import argparse

from inward.commands import COMMANDS

SHELLS = ("bash", "zsh", "tcsh")


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "completion",
        help=COMMANDS["completion"],
        description="Prints a script that lets a shell complete commands and options. It is made once; run it again "
        "after an update.",
        epilog="example: inward completion bash > ~/.local/share/bash-completion/completions/inward",
    )
    parser.add_argument("shell", choices=SHELLS, help="which")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import shtab

    from inward.commands.parser import command_line

    print(shtab.complete(command_line(), shell=args.shell))
    return 0
