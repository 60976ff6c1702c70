"""Command-line options made from ``Settings``, so that a knob is described in one place."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
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


def head_folder(args: argparse.Namespace, given: str) -> Path:
    """The folder of the active version of a head, which was given by its folder or by its name in the heads folder.

    Raises:
        SetupError: there is none, or the folder holds several.
    """
    from inward.heads import store
    from inward.processes.wiring import heads_folder

    folder = Path(given).expanduser()
    if folder.is_dir():
        names = sorted({found.name for found in store.find(folder)})
        if len(names) != 1:
            raise SetupError(f"{folder} holds {', '.join(names) or 'no head'}: give the folder of one head")
        return store.active_path(folder, names[0])
    heads = heads_folder(settings_of(args))
    if heads is None:
        raise SetupError(f"{given} is not a folder, and there is no heads folder to find a head of that name in")
    return store.active_path(heads, given)


def _help(name: str) -> str:
    field = Settings.model_fields[name]
    default = (
        ""
        if field.default in (None, frozenset()) or isinstance(field.default, bool)
        else f" (default: {field.default})"
    )
    return f"{field.description}{default}".replace("%", "%%").replace("`", "")
