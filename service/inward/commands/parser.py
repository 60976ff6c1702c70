"""The command line: which commands there are, and what somebody meant who mistyped one."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Any

from inward import __version__
from inward.commands import COMMANDS


class Parser(argparse.ArgumentParser):
    """argparse's, which says of an option that there isn't which one was probably meant."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuses unknown options here, where the ones of this command are known."""
        found, unknown = super().parse_known_args(args, namespace)
        for word in unknown:
            if word.startswith("--"):
                option = word.partition("=")[0]
                self.error(f"there is no option {option}{did_you_mean(option, self._option_string_actions)}")
        return found, unknown


def command_line(commands: Iterable[str] = COMMANDS) -> Parser:
    """The parser of the whole command line.

    Args:
        commands: those whose options are wanted; of the others it knows only that they are there.
    """
    wanted = set(commands)
    top = Parser(
        prog="inward",
        description="Rewards read from inside the model: one base model, loaded once, serves small heads that read its "
        "hidden states.",
        epilog="`inward COMMAND --help` explains a command. Every setting may also be given as INWARD_<NAME>.",
    )
    top.add_argument("--version", action="version", version=f"inward {__version__}")
    parsers = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, purpose in COMMANDS.items():
        parser = parsers.add_parser(name, help=purpose)
        if name in wanted:
            module = import_module(f"inward.commands.{name.replace('-', '_')}")
            module.add(parser)
            parser.set_defaults(run=module.run)
    return top


def parse(words: Sequence[str]) -> argparse.Namespace:
    """What ``words`` ask for; ends the process with a message and exit status 2 where that is nothing that there is."""
    name = next((word for word in words if not word.startswith("-")), None)
    if name is not None and name not in COMMANDS:
        command_line(()).error(f"there is no command {name!r}{did_you_mean(name, COMMANDS)}")
    return command_line([] if name is None else [name]).parse_args(words)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The known word that is most like ``word``, as the end of a sentence; else what to do instead."""
    from difflib import get_close_matches  # only here: half of what `inward --version` would take

    [*close] = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else "; --help lists those that there are"
