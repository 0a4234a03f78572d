"""A headless Chromium for tests of pages: the one on PATH or in $CHROMIUM; without one they are skipped, with the reason."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def launched() -> Iterator:
    """A playwright browser."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is on PATH; set CHROMIUM to one")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


def watched(browser) -> tuple:
    """A page, and the list of everything that goes wrong on it: errors, failed requests, refusals, requests to elsewhere."""
    page, trouble = browser.new_page(viewport={"width": 1280, "height": 900}), []
    page.on("pageerror", lambda error: trouble.append(f"error: {error}"))
    page.on("console", lambda said: trouble.append(said.text) if said.type == "error" else None)
    page.on("requestfailed", lambda request: trouble.append(f"failed: {request.url[:200]} {request.failure}"))
    page.on("response", lambda response: trouble.append(response.url) if response.status >= 400 else None)
    page.set_default_timeout(15_000)
    return page, trouble
