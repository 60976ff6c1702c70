"""Command-line options made from ``Settings``, so that a knob is described in one place."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from inward.commands.parser import did_you_mean
from inward.errors import SetupError
from inward.settings import PREFIX, Settings, unknown_variables

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
SERVERS = ("serve", "api", "worker")
"""Commands that have a log."""


def add_settings(parser: argparse.ArgumentParser, names: Iterable[str] | None = None) -> None:
    """Adds an option for each setting (or those named); an option that is not given leaves the environment variable
    in force.
    """
    group = parser.add_argument_group("settings", "each may also be given as INWARD_<NAME>, or in the file of --config")
    for name in dict.fromkeys(("config", *(names or Settings.model_fields))):
        field = Settings.model_fields[name]
        option: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": _help(name)}
        if field.annotation is bool:
            option["action"] = argparse.BooleanOptionalAction
        else:
            option["metavar"] = name.rsplit("_", 1)[-1].upper()
        group.add_argument(f"--{name.replace('_', '-')}", **option)


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings: options before environment before the file of ``--config`` before defaults. Variables that look
    like settings and are none are named on standard error, by a server in its log.

    Raises:
        SetupError: a value that a setting does not take, or a file that can't be used.
    """
    given = {name: value for name, value in vars(args).items() if name in Settings.model_fields}
    named = {name.upper() for name, value in os.environ.items() if value}
    file = given.get("config") or os.environ.get(f"{PREFIX}CONFIG")
    written = {} if not file else _of_file(Path(file).expanduser())
    written = {name: v for name, v in written.items() if name not in given and f"{PREFIX}{name.upper()}" not in named}
    if getattr(args, "command", None) not in SERVERS:
        for name, meant in unknown_variables(os.environ).items():
            hint = f"; did you mean {meant}?" if meant else ""
            print(f"inward: there is no setting {name}{hint}", file=sys.stderr)
    try:
        return Settings(**{**written, **given})
    except ValidationError as error:
        raise SetupError("; ".join(_problem(e, written, file) for e in error.errors())) from None


def _of_file(file: Path) -> dict[str, Any]:
    """Settings by their names, as YAML has them.

    Raises:
        SetupError: it can't be read, is no mapping, or names what is no setting.
    """
    import yaml

    try:
        content = yaml.safe_load(file.read_bytes())
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise SetupError(f"{file} can't be read as YAML: {reason} (--config)") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SetupError(f"{file} must hold settings by their names, such as `max_items: 64` (--config)")
    for name in content:
        if name not in Settings.model_fields or name == "config":
            known = sorted(Settings.model_fields.keys() - {"config"})
            raise SetupError(f"{file}: there is no setting {name!r}{did_you_mean(str(name), known)} (--config)")
    return {name: value for name, value in content.items() if value is not None}


def _problem(error: Mapping[str, Any], written: Mapping[str, Any], file: Any) -> str:
    """Where a value came from, and what is wrong with it."""
    name, *rest = map(str, error["loc"])
    path = ".".join((name, *rest)) if name in written else "-".join((name, *rest)).replace("_", "-")
    return f"{file}: {path}: {error['msg']}" if name in written else f"--{path}: {error['msg']}"


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


def cache_folder(name: str) -> Path:
    """Finished parts of a pass through the model: found again after an interruption, removed once it is through."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return base / "inward" / "states" / name


def _help(name: str) -> str:
    field = Settings.model_fields[name]
    untold = field.default in (None, frozenset(), ()) or isinstance(field.default, bool)
    default = "" if untold else f" (default: {field.default})"
    return f"{field.description}{default}".replace("%", "%%").replace("`", "")
