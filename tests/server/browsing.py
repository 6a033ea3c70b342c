"""Waiting for a page under a strict policy."""

import time


def wait_until(page, expression, seconds=10.0):
    """Until JavaScript says yes. Playwright's own way of asking again and again is what the page's policy forbids."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"not within {seconds:g} s: {expression}"
        page.wait_for_timeout(15)
