"""Data that heads are fitted on and judged by, over the one reader of rows (``inward_client.rows``), which trainer and
adapters have, too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from inward.errors import DataError
from inward_client import rows


@contextmanager
def data_errors() -> Iterator[None]:
    """The reader's errors as those of this package; also a decorator.

    Raises:
        DataError: where, and what is wrong.
    """
    try:
        yield
    except rows.DataError as error:
        raise DataError(error.message, param=error.column) from None


def told(found: rows.Collected[Any]) -> rows.Collected[Any]:
    """``found``, after telling the user what was left out of it, and why."""
    for warning in found.warnings():
        print(f"note: {warning}", file=sys.stderr)
    return found
