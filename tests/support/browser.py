"""A real browser, without a window: Chromium, driven by Playwright. Tests that want it are skipped where it is not."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def open_page() -> Iterator[Any]:
    """An empty page. Whatever its scripts raise fails the test."""
    api = pytest.importorskip("playwright.sync_api", reason="no browser: pip install playwright")
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no browser: Chromium is not installed")
    errors: list[str] = []
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        try:
            page = browser.new_page(accept_downloads=True)
            page.on("pageerror", lambda error: errors.append(str(error)))
            yield page
        finally:
            browser.close()
    assert not errors
