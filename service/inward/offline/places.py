"""Where results are to be written, looked at before the work: what would be in the way then is said now."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from inward.errors import SetupError
from inward.heads import store
from inward.heads.base import NAME
from inward.offline.states.saved import holds_states

_PAGE = b"<!doctype html>"
"""How our pages begin."""


def check_head(folder: Path, name: str, *, replace: bool) -> None:
    """That a head of this name can be saved in ``folder``. With ``replace`` it takes the place of a head, and of
    nothing else.

    Raises:
        SetupError: names what is in the way.
    """
    if re.fullmatch(NAME, name) is None:
        raise SetupError(
            f"{name!r} can't be a head's name: letters, digits, '.', '_' and '-', at most 64, the first a letter or "
            "digit; choose another last part of --out, or say --name"
        )
    if folder.exists() and not replace:
        raise SetupError(f"{folder} exists already: choose another folder, or say --replace")
    if folder.exists() and not (folder.is_dir() and (store.holds_head(folder) or not any(folder.iterdir()))):
        raise SetupError(f"{folder} is there and holds no head: --replace takes the place of heads only")
    _check_parent(folder)


def check_states(path: Path) -> None:
    """Of states; see ``check_file``."""
    check_file(path, "file of states", holds_states)


def check_page(path: Path) -> None:
    """Of a page; see ``check_file``."""
    check_file(path, "page", _is_page)


def check_file(path: Path, kind: str, is_one: Callable[[Path], bool] = lambda _: True) -> None:
    """That a file can be written to ``path``; over another one only if that is of the same kind.

    Args:
        kind: what to call it.
        is_one: whether a file is one.

    Raises:
        SetupError: names what is in the way.
    """
    if path.is_dir():
        raise SetupError(f"{path} is a folder: name a file in it")
    if path.exists() and not path.is_file():
        raise SetupError(f"a {kind} can't be {path}, standard output or a device: name a file")
    if path.exists() and path.stat().st_size and not is_one(path):
        raise SetupError(f"{path} is there already and is no {kind}: name another file")
    _check_parent(path)


def _check_parent(path: Path) -> None:
    """That ``path`` can be made, and folders above it where there are none."""
    above = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not above.is_dir():
        raise SetupError(f"{above} is not a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise SetupError(f"{above} can't be written to: name another place than {path}")


def _is_page(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_PAGE)).lower() == _PAGE
    except OSError:
        return False
