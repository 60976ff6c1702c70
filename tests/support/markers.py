"""Which marks a test gets by itself: from what its module imports, and from the fixtures that it asks for.

What a module imports is read from the sources, not tried: ``pytest -m fast`` then never imports the modules that need
torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = tuple(ROOT / folder for folder in ("service", "clients/python", "clients/trainer", "tests"))
MODEL = {"torch", "transformers", "trl", "peft", "datasets", "sklearn", "tensorboard"}
"""Packages that a test has only for a model; they take seconds to import."""
PROCESS = {"subprocess", "multiprocessing"}
CALLERS = {"service/inward/commands/parser.py", "tests/support/fleet.py", "tests/support/serving.py"}
"""What calls commands by their names."""
REDIS_FIXTURES = {"redis_server", "own_redis", "_shared_redis"}
MODEL_FIXTURES = {"demo_server"}

_ON_REDIS = re.compile(r"\b(redis|two_processes)\b")
_AT_TOP = re.compile(r"^(?:from +([\w.]+) +import +(.+)|import +([\w., ]+))", re.MULTILINE)
_ANYWHERE = re.compile(r"^ *(?:from +([\w.]+) +import +(.+)|import +([\w., ]+))", re.MULTILINE)


def of_module(file: Path) -> set[str]:
    """Marks of all tests in ``file``."""
    if 'importorskip("vllm"' in file.read_text(encoding="utf-8"):
        return {"vllm"}
    used = imported(file)
    return {"model"} if used & MODEL else set() if _starts_processes(file) else {"fast"}


def of_test(marks: Iterable[str], fixtures: Iterable[str], parameters: str) -> set[str]:
    """Marks of one test, whose module has ``marks``; a parameter may ask for Redis, too."""
    asked = set(fixtures)
    marks = set(marks)
    marks |= {"redis"} if asked & REDIS_FIXTURES or _ON_REDIS.search(parameters) else set()
    marks |= {"model"} if asked & MODEL_FIXTURES else set()
    return marks if marks == {"fast"} else marks - {"fast"}


def imported(file: Path) -> frozenset[str]:
    """Top-level packages from elsewhere that come with ``file``: those that it imports, anywhere in it, and those that
    modules of ours import at once when it imports them.
    """
    modules = _closure(file, _AT_TOP)
    pairs = [(module, _ANYWHERE if module == file else _AT_TOP) for module in modules]
    names = {name for module, pattern in pairs for name in _names(module, pattern)}
    return frozenset(name.partition(".")[0] for name in names if not _file(name))


def reached(file: Path) -> frozenset[Path]:
    """Our own modules that the tests in ``file`` can come to, by imports or by commands that they start."""
    return _closure(file, _ANYWHERE)


@cache
def _closure(file: Path, pattern: re.Pattern[str]) -> frozenset[Path]:
    """``file``, the modules of ours that it imports anywhere, and those that ``pattern`` finds in them, and so on."""
    seen: set[Path] = set()
    waiting = [file]
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        names = _names(module, _ANYWHERE if module == file else pattern)
        waiting += [part for name in names for part in _file(name)]
        if pattern is _ANYWHERE and module.relative_to(ROOT).as_posix() in CALLERS:
            waiting += (ROOT / "service/inward/commands").glob("*.py")
    return frozenset(seen)


def _starts_processes(file: Path) -> bool:
    """Whether it or a helper of the tests starts some; that a module of the service could is no matter."""
    names = _names(file, _ANYWHERE)
    helpers = [part for name in names if name.startswith("support.") for part in _file(name)]
    own = set(names) & PROCESS
    return bool(own) or any(_starts_processes(helper) for helper in helpers if helper != file)


@cache
def _names(file: Path, pattern: re.Pattern[str]) -> tuple[str, ...]:
    """What is imported, with the names that may be modules themselves."""
    found: list[str] = []
    for source, names, plain in pattern.findall(file.read_text(encoding="utf-8")):
        if plain:
            found += (name.split(" as ")[0].strip() for name in plain.split(","))
        else:
            found.append(source)
            found += (f"{source}.{name.split(' as ')[0].strip(' ()')}" for name in names.split(",") if _file(source))
    return tuple(found)


@cache
def _file(name: str) -> tuple[Path, ...]:
    """The files of our module ``name`` and of the packages that it is in; none for anybody else's."""
    for root in SOURCES:
        path = root.joinpath(*name.split("."))
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                parents = [parent / "__init__.py" for parent in path.parents if root in parent.parents]
                return (file, *(parent for parent in parents if parent.is_file()))
    return ()
