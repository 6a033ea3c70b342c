"""A browser for the page's tests, where there is one, and waiting for a page under a strict policy."""

import os
import shutil
import time

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_browser():
    """Its path; playwright's own, if that has been installed, is None."""
    given = os.environ.get("TRIFORCE_TEST_BROWSER")
    return given or next(filter(None, map(shutil.which, NAMES)), None)


@pytest.fixture(scope="session")
def chromium():
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    with api.sync_playwright() as playwright:
        path = find_browser()
        if path is None and not os.path.exists(playwright.chromium.executable_path):
            pytest.skip("needs a browser: apt-get install chromium, or playwright install chromium")
        # Root, as in a container, has no sandbox for it; it sees nothing but our own page.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def wait_until(page, expression, seconds=10.0):
    """Until JavaScript says yes. Playwright's own way of asking again and again is what the page's policy forbids."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"not within {seconds:g} s: {expression}"
        page.wait_for_timeout(15)
