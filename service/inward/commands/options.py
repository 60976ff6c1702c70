"""Command-line options made from ``Settings``, so that a knob is described in one place."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from inward.errors import SetupError
from inward.settings import Settings

MODEL_SETTINGS = (
    "model",
    "revision",
    "backbone",
    "dtype",
    "device",
    "token_budget",
    "trust_remote_code",
    "template",
    "max_tokens",
)
"""What a command needs that loads a backbone and serves nobody."""


def add_settings(parser: argparse.ArgumentParser, names: Iterable[str] | None = None) -> None:
    """Adds an option for each setting (or those named); an option that is not given leaves the environment variable
    in force.
    """
    group = parser.add_argument_group("settings", "each may also be given as INWARD_<NAME>")
    for name in names or Settings.model_fields:
        field = Settings.model_fields[name]
        option: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": _help(name)}
        if field.annotation is bool:
            option["action"] = argparse.BooleanOptionalAction
        else:
            option["metavar"] = name.rsplit("_", 1)[-1].upper()
        group.add_argument(f"--{name.replace('_', '-')}", **option)


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings: options before environment before defaults.

    Raises:
        SetupError: a value that a setting does not take.
    """
    given = {name: value for name, value in vars(args).items() if name in Settings.model_fields}
    try:
        return Settings(**given)
    except ValidationError as error:
        problems = [f"--{'-'.join(map(str, e['loc'])).replace('_', '-')}: {e['msg']}" for e in error.errors()]
        raise SetupError("; ".join(problems)) from None


def _help(name: str) -> str:
    field = Settings.model_fields[name]
    default = (
        ""
        if field.default in (None, frozenset()) or isinstance(field.default, bool)
        else f" (default: {field.default})"
    )
    return f"{field.description}{default}".replace("%", "%%").replace("`", "")
