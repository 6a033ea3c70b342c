"""The page in a real browser, with the real server behind it."""

from __future__ import annotations

import pytest

from tests.server.browsing import wait_until

pytestmark = pytest.mark.browser
ANSWERED = "document.querySelectorAll('article.assistant > .text').length === {} && " + (
    "[...document.querySelectorAll('article.assistant > .text')].at(-1).textContent.length > 5"
)


def test_ask_watch_stop_and_ask_again(chromium, address, service):
    context = chromium.new_context(reduced_motion="reduce")
    context.set_default_timeout(30_000)
    page, complaints = context.new_page(), []
    page.on("console", lambda said: said.type in ("error", "warning") and complaints.append(said.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    try:
        page.goto(address)
        wait_until(page, "document.querySelector('#model').textContent !== ''")
        assert page.text_content("#model") == "tiny"
        for turn in (1, 2):
            page.fill("#question", f"Question {turn}: what is this?")
            page.press("#question", "Enter")
            wait_until(page, ANSWERED.format(turn), seconds=30)
            # Both in one go: a short answer may end in between.
            page.evaluate(
                "() => { const stop = document.querySelector('#stop'); stop.checkVisibility() && stop.click(); }"
            )
            page.wait_for_selector("#send:visible")
        assert service.stats.reused_tokens > 0
        wait_until(page, "!document.body.innerText.includes('undefined') && !document.body.innerText.includes('NaN')")
    finally:
        context.close()
    assert complaints == []
