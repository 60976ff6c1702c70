"""What the contributing and the architecture page say of the tree is so."""

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from support import markers

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
FOLDERS = {
    "service/inward": "",
    "clients/python/inward_client": "client/",
    "clients/trainer/inward_trainer": "trainer/",
}
"""Of modules, and where below ``tests`` those with the same name are."""
MODULES = [
    (file, prefix, file.relative_to(ROOT / folder).with_suffix(""))
    for folder, prefix in FOLDERS.items()
    for file in sorted((ROOT / folder).rglob("*.py"))
    if not file.stem.startswith("__")
]


def table():
    """Patterns of modules, each with the tests that the page names."""
    rows = re.findall(r"^\| (`.*) \| (`tests.*) \|$", CONTRIBUTING, re.MULTILINE)
    return {
        pattern: [ROOT / test for test in re.findall(r"`(.+?)`", tests)]
        for patterns, tests in rows
        for pattern in re.findall(r"`(.+?)`", patterns)
    }


def files_of(places):
    return [file for place in places for file in ([place] if place.is_file() else place.rglob("test_*.py"))]


@pytest.mark.parametrize(("file", "prefix", "name"), MODULES, ids=lambda part: str(part))
def test_a_module_has_a_test_of_its_name_or_the_table_says_where_it_is_tested(file, prefix, name):
    if (TESTS / f"{prefix}{name.parent}/test_{name.name}.py").is_file():
        return
    package = next(folder for folder in FOLDERS if file.is_relative_to(ROOT / folder))
    full = str(name) if package == "service/inward" else f"{Path(package).name}/{name}"
    places = [place for pattern, named in table().items() if fnmatch(full, pattern) for place in named]
    assert places, f"{full} has no test of its name, and CONTRIBUTING.md does not say where it is tested"
    assert any(file in markers.reached(test) for test in files_of(places)), f"none of {places} reaches {full}"


@pytest.mark.parametrize("place", sorted({place for places in table().values() for place in places}), ids=str)
def test_the_tests_that_the_table_names_are_there(place):
    assert files_of([place])


def test_the_floors_are_drawn_as_they_are_enforced():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    [layers] = [contract["layers"] for contract in contracts if contract.get("containers") == ["inward"]]
    drawn = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    assert "```text\n" + "\n".join(layers) + "\n```" in drawn


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "README.md"])
def test_every_make_target_that_is_named_exists(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"^make ([\w-]+)", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_tests_that_make_runs_are_there():
    named = re.findall(r"\btests/[\w/*.]+", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert named
    assert [path for path in named if not list(ROOT.glob(path.replace("tests/*", "tests/**/*")))] == []
