"""A headless browser for tests: the chromium of this machine, driven by playwright, which downloads nothing."""

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def start() -> Iterator[Any]:
    """Yields a browser, for a fixture; skips the test if playwright or a browser is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make setup")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"there is no browser: none of {', '.join(NAMES)} is on PATH (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@contextlib.contextmanager
def page_of(browser: Any, expected: str | None = None, **options: Any) -> Iterator[Any]:
    """A page of a new profile; at the end, it must have said nothing to the console and raised no error.

    Args:
      browser: what `start` yields.
      expected: how messages begin that the browser itself writes to the console in this test.
      options: options of the profile, such as `locale="zh-CN"` or `color_scheme="dark"`.
    """
    context = browser.new_context(**({"locale": "en-GB"} | options))
    context.set_default_timeout(20_000)
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(f"error: {error}"))
    try:
        yield page
        assert [one for one in said if expected is None or not one.startswith(expected)] == []
    finally:
        context.close()
