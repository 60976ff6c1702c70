"""The real model that comes as a package; tests that want it say so where it isn't installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from inward.backbones.loading import SMOLLM2, resolve
from inward.errors import SetupError


def smollm2(dtype: str = "float32") -> Path:
    """Its folder, converted into the user's own cache: once, not once a run."""
    try:
        return resolve(SMOLLM2, dtype=dtype)
    except SetupError as error:
        if "not installed" not in error.message:
            raise
        pytest.skip(error.message)
