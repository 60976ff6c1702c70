"""What ``inward evaluate`` refuses by the options alone."""

import argparse

import pytest

from inward.errors import SetupError
from inward.offline.evaluate.options import add_arguments, check


def parsed(line):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(line.split())


@pytest.mark.parametrize("how", ["--head h --pairs p", "--compare a b --pairs p", "--cross-validate legend --states s"])
def test_options_that_go_together_are_taken(how):
    check(parsed(f"{how} --json --limit 3"))


@pytest.mark.parametrize(
    ("how", "given"),
    [
        *(("--compare a b --pairs p", one) for one in ("--html x", "--calibration x", "--xstest x", "--by x")),
        *(("--cross-validate legend --pairs p", one) for one in ("--calibration x", "--xstest x")),
        *(("--head h --cross-validate --pairs p", one) for one in ("--calibration x", "--xstest x")),
        *(("--head h --states s", one) for one in ("--calibration x", "--xstest x", "--by x", "--response-tokens 3")),
    ],
)
def test_an_option_that_would_do_nothing_is_refused_by_name(how, given):
    with pytest.raises(SetupError, match=f"does not go with {given.split()[0]}$"):
        check(parsed(f"{how} {given}"))
