"""Numbers that are too small are refused by the option's name."""

from argparse import Namespace

import pytest

from inward.errors import SetupError
from inward.offline.options import check_least


def test_what_was_not_given_or_is_large_enough_is_taken():
    check_least(Namespace(limit=None, seed=0), limit=1, seed=0, samples=2)


def test_what_is_too_small_is_named():
    with pytest.raises(SetupError, match=r"^--page-rows 0: at least 1$"):
        check_least(Namespace(limit=3, page_rows=0), limit=1, page_rows=1)
