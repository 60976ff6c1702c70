"""Real data, where it lies beside the checkout; tests that want it say so when it doesn't."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).parents[3] / "shared" / "data"


def rows(name: str, n: int | None = None) -> list[dict[str, Any]]:
    """The first ``n`` rows of a JSONL file of the shared data; skips the test where there is none."""
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"real data is not beside this checkout: {path.name} would be in ../shared/data")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:n]]
