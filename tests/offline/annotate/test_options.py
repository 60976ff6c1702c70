"""What ``inward annotate`` refuses by the options alone."""

import argparse

import pytest

from inward.errors import SetupError
from inward.offline.annotate.options import AnnotateOptions, add_arguments


def options(line):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return AnnotateOptions.of(parser.parse_args(line.split()))


def test_decisions_go_with_what_says_how_rows_are_read_and_written():
    line = "in out --apply x --layout trl --columns prompt=q --parse-json --prefix x_ --restart --split test"
    assert options(line).apply.name == "x"


@pytest.mark.parametrize(
    "given",
    [
        "--limit 0", "--drop-below 0", "--only-flipped", "--trl", "--html x", "--argilla x", "--suspicious", "--by x",
        "--clusters", "--json", "--head h", "--url u", "--truncate", "--replace-columns", "--engine ray", "--at-once 2",
    ],
)  # fmt: skip
def test_decisions_go_with_nothing_that_annotates(given):
    with pytest.raises(SetupError, match=f"does not go with {given.split()[0]}$"):
        options(f"in out --apply x {given}")


def test_no_rows_at_all_are_no_limit():
    with pytest.raises(SetupError, match=r"^--limit 0: at least 1$"):
        options("in out --limit 0")
