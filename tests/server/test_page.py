"""The page in a real browser, against a server that says what it is asked to say."""

import re

import pytest

pytest.importorskip("fastapi", reason="needs fastapi: pip install 'offload-triforce[serve]'")
pytest.importorskip("uvicorn", reason="needs uvicorn: pip install 'offload-triforce[serve]'")

from tests.server.browsing import wait_until
from tests.server.fake_backend import Backend, make_app, serve

pytestmark = pytest.mark.browser
PHONE, DESK = {"width": 375, "height": 700}, {"width": 1280, "height": 800}


@pytest.fixture(scope="module")
def served():
    backend = Backend()
    with serve(make_app(backend)) as address:
        yield backend, address


@pytest.fixture
def backend(served):
    backend = served[0]
    backend.script, backend.asked, backend.pause, backend.cancelled = {}, [], 0.002, 0
    backend.key = backend.stats = None
    backend.thoughts = ""
    return backend


@pytest.fixture
def page(chromium, served, backend):
    """A page that has just been opened. Whatever the browser complains of is a failure."""
    context = chromium.new_context(viewport=DESK, reduced_motion="reduce")
    context.set_default_timeout(10_000)
    page, complaints = context.new_page(), []
    page.expected = []  # patterns of complaints that a test provokes
    page.on("console", lambda said: said.type in ("error", "warning") and complaints.append(said.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}") or dialog.dismiss())
    page.goto(served[1])
    wait_until(page, "document.querySelector('#model').textContent !== ''")
    yield page
    context.close()
    assert [text for text in complaints if not any(re.search(each, text) for each in page.expected)] == []


def ask(page, question, wait=True):
    page.fill("#question", question)
    page.press("#question", "Enter")
    if wait:
        page.wait_for_selector("#send:visible")


def answers(page):
    return [each.inner_text() for each in page.query_selector_all("article.assistant > .text")]


def drop(page, name, text, kind="text/plain"):
    """As a browser tells a page of it."""
    page.evaluate(
        """([name, text, type]) => {
            const files = new DataTransfer();
            files.items.add(new File([text], name, { type }));
            for (const kind of ["dragover", "drop"])
                document.body.dispatchEvent(
                    new DragEvent(kind, { dataTransfer: files, bubbles: true, cancelable: true }));
        }""",
        [name, text, kind],
    )


def test_an_answer_streams(page, backend):
    backend.pause = 0.02
    ask(page, "count to 60", wait=False)
    wait_until(page, "document.querySelector('article.assistant > .text')?.textContent.startsWith('1 2 3')")
    early = answers(page)[0]
    assert page.is_visible("#stop")
    assert not page.is_visible("#send")
    page.wait_for_selector("#send:visible", timeout=20_000)
    assert answers(page) == [" ".join(map(str, range(1, 61)))]
    assert answers(page)[0].startswith(early)
    assert early != answers(page)[0], "it came at once"
    (body,) = backend.asked
    assert body["stream"]
    assert body["return_progress"]
    assert body["model"] == "fake-model"
    assert page.text_content("#status") == "Answer complete"
    assert answers(page)[0] in page.text_content("#spoken"), "screen readers have got it"


def test_what_the_model_thinks_is_shown_apart(page, backend):
    """Folded, unfolded by the keyboard, as plain text, and not sent back as if it had been said."""
    backend.pause, backend.thoughts = 0.02, "Hm, <img src=x onerror=alert(1)> **five**?"
    ask(page, "count to 5", wait=False)
    wait_until(page, "document.querySelector('article.assistant details')?.hidden === false")
    assert answers(page) == [""], "nothing has been said yet"
    page.wait_for_selector("#send:visible")
    assert answers(page) == ["1 2 3 4 5"]
    assert not page.is_visible("article.assistant details .text")
    page.focus("article.assistant summary")
    page.keyboard.press("Enter")
    assert page.inner_text("article.assistant details .text") == backend.thoughts
    assert page.query_selector("article.assistant img") is None
    assert backend.thoughts not in page.text_content("#spoken")
    page.reload()
    assert page.text_content("article.assistant details .text") == backend.thoughts
    ask(page, "count to 2")
    assert [message["content"] for message in backend.asked[1]["messages"]] == ["count to 5", "1 2 3 4 5", "count to 2"]


def test_a_phone_by_keyboard_alone_in_the_dark(page, backend):
    """Ask, stop, unfold the runtime, change a setting, and come back to the question; each control is large enough."""
    page.set_viewport_size(PHONE)
    page.emulate_media(color_scheme="dark")
    backend.pause = 0.02

    def tab_to(name, way="Tab"):
        for _ in range(30):
            if page.evaluate("document.activeElement.id || document.activeElement.textContent") == name:
                return
            page.keyboard.press(way)
        raise AssertionError(f"{name} is not reached by {way}")

    tab_to("Skip to the question", "Shift+Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "question"
    page.keyboard.type("count to 500")
    page.keyboard.press("Enter")
    wait_until(page, "document.querySelector('article.assistant > .text')?.textContent.includes('9')")
    tab_to("stop")
    page.keyboard.press("Enter")
    page.wait_for_selector("#send:visible")
    tab_to("show-live", "Shift+Tab")
    page.keyboard.press("Enter")
    assert page.get_attribute("#show-live", "aria-expanded") == "true"
    wait_until(page, "document.querySelectorAll('#live [role=meter]').length === 3")
    tab_to("show-settings")
    page.keyboard.press("Enter")
    assert page.evaluate("document.querySelector('#settings').contains(document.activeElement)")
    page.fill("[name=seed]", "3")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "show-settings", "the focus comes back"
    tab_to("question")
    page.keyboard.type("count to 2")
    page.keyboard.press("Enter")
    page.wait_for_selector("#send:visible")
    assert answers(page)[-1] == "1 2"
    assert backend.asked[-1]["seed"] == 3
    small = page.eval_on_selector_all(
        "button",
        """all => all.filter((each) => each.checkVisibility() && each.getBoundingClientRect().height < 24)
            .map((each) => each.outerHTML)""",
    )
    assert small == [], "a finger has to hit them"


def test_the_prefill_has_a_bar_with_the_time_left(page, backend):
    backend.pause = 0.15
    backend.script["x" * 400] = "read"
    ask(page, "x" * 400, wait=False)
    wait_until(page, "/about \\d+ s left/.test(document.querySelector('#prefill-left').textContent)")
    assert page.text_content("#prefill-what") == "Reading 400 tokens, 8 of them known from before"
    assert 0 < page.evaluate("document.querySelector('#prefill-bar').position") < 1
    page.wait_for_selector("#send:visible")
    assert not page.is_visible("#prefill")


@pytest.mark.parametrize("way", ["button", "escape"])
def test_stopping(page, backend, way):
    backend.pause = 0.02
    ask(page, "count to 500", wait=False)
    wait_until(page, "document.querySelector('article.assistant > .text')?.textContent.includes('9')")
    if way == "button":
        page.click("#stop")
    else:
        page.keyboard.press("Escape")
    page.wait_for_selector("#send:visible")
    assert not answers(page)[0].endswith("500")
    assert "Stopped" in page.inner_text("article.assistant")
    assert page.text_content("#status") == "Stopped"
    for _ in range(100):
        if backend.cancelled:
            break
        page.wait_for_timeout(20)
    assert backend.cancelled == 1, "the server goes on"
    ask(page, "count to 3")
    assert answers(page)[1] == "1 2 3"


def test_keys(page, backend):
    page.fill("#question", "one")
    page.press("#question", "Shift+Enter")
    page.keyboard.type("two")
    assert page.input_value("#question") == "one\ntwo"
    assert not backend.asked
    page.press("#question", "Enter")
    page.wait_for_selector("#send:visible")
    assert backend.asked[0]["messages"] == [{"role": "user", "content": "one\ntwo"}]
    page.press("#question", "Enter")
    assert len(backend.asked) == 1, "nothing was written, so nothing is asked"
    seen = []
    for _ in range(12):
        page.keyboard.press("Tab")
        style = "getComputedStyle(document.activeElement)"
        seen.append(page.evaluate(f"[document.activeElement.id, {style}.outlineStyle, {style}.outlineWidth]"))
    assert {"pick", "send", "new-chat"} <= {name for name, *_ in seen}, "reached by Tab alone"
    assert all(style != "none" and width != "0px" for name, style, width in seen if name), "the focus is seen"


def test_a_dropped_document_goes_along(page, backend):
    drop(page, "poem.txt", "Roses are <b>red</b>\n")
    page.wait_for_selector("#documents .chip")
    assert page.inner_text("#documents .chip") == "poem.txt 21 characters"
    ask(page, "what colour?")
    (message,) = backend.asked[0]["messages"]
    assert message["content"] == '<document name="poem.txt">\nRoses are <b>red</b>\n\n</document>\n\nwhat colour?'
    assert page.inner_text("article.user .chip") == "poem.txt 21 characters"
    assert page.inner_text("#documents") == ""
    ask(page, "and now?")
    assert backend.asked[1]["messages"][0] == message, "the text that has been read is the same: it can be reused"


def test_documents_that_cannot_be_read_say_why(page):
    drop(page, "picture.png", "\0\1\2", "image/png")
    wait_until(page, "document.querySelector('#notices').textContent.includes('picture.png: it is not text')")
    drop(page, "empty.txt", "  ")
    wait_until(page, "document.querySelector('#notices').textContent.includes('no text in it')")
    assert page.inner_text("#documents") == ""


def test_a_picked_document_can_be_left_out(page, backend):
    page.set_input_files("#file", [{"name": "a.py", "mimeType": "text/x-python", "buffer": b"print(1)"}])
    page.click("#documents button")
    assert page.inner_text("#documents") == ""
    ask(page, "hello")
    assert backend.asked[0]["messages"][0]["content"] == "hello"


def test_pdf_goes_by_the_server(page, backend):
    pytest.importorskip("pypdf")
    page.expected = ["422"]
    page.set_input_files("#file", [{"name": "x.pdf", "mimeType": "application/pdf", "buffer": b"%PDF-1.4 nonsense"}])
    wait_until(
        page, "document.querySelector('#notices').textContent.includes('x.pdf: The PDF could not be read')", seconds=40
    )


def test_a_reload_goes_on(page, backend):
    drop(page, "a.txt", "some text")
    page.wait_for_selector("#documents .chip")
    ask(page, "count to 4")
    page.fill("#question", "half a ques")
    page.reload()
    assert answers(page) == ["1 2 3 4"]
    assert page.input_value("#question") == "half a ques"
    ask(page, "count to 2")
    roles = [message["role"] for message in backend.asked[1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    assert backend.asked[1]["messages"][:1] == backend.asked[0]["messages"], "with its document"
    assert answers(page) == ["1 2 3 4", "1 2"]


def test_a_reload_in_the_middle_of_an_answer_keeps_what_there_was(page, backend):
    backend.pause = 0.02
    ask(page, "count to 400", wait=False)
    wait_until(page, "document.querySelector('article.assistant > .text')?.textContent.includes('12')")
    page.reload()
    assert answers(page)[0].startswith("1 2 3 4 5 6 7 8 9 10 11 12")
    assert "Not complete" in page.inner_text("article.assistant")
    wait_until(page, "document.querySelector('#model').textContent !== ''")
    backend.script["count to 400"] = "shorter"
    page.click("article.assistant .again")
    page.wait_for_selector("#send:visible")
    assert answers(page) == ["shorter"]
    assert len(backend.asked[1]["messages"]) == 1


def test_going_back_to_a_question(page, backend):
    for question in ("count to 2", "count to 3"):
        ask(page, question)
    page.click("article.user >> nth=0 >> text=Edit")
    assert page.input_value("#question") == "count to 2"
    assert answers(page) == []
    ask(page, "count to 5")
    assert answers(page) == ["1 2 3 4 5"]
    page.click("#new-chat")
    assert page.is_visible("#welcome")
    page.reload()
    assert answers(page) == []


def test_a_new_chat_while_an_answer_comes(page, backend):
    backend.pause = 0.02
    ask(page, "count to 500", wait=False)
    wait_until(page, "document.querySelector('article.assistant > .text')?.textContent.includes('9')")
    page.click("#new-chat")
    page.wait_for_selector("#send:visible")
    assert answers(page) == []
    ask(page, "count to 2")
    assert answers(page) == ["1 2"]
    assert len(backend.asked[1]["messages"]) == 1


def test_settings_are_sent_and_kept(page, backend):
    page.click("#show-settings")
    given = {"system": "Be short.", "temperature": "0.35", "top_p": "0.9", "seed": "7", "max_tokens": "50"}
    for name, value in given.items():
        page.fill(f"[name={name}]", value)
    page.click("#settings button.main")
    page.reload()
    ask(page, "hello")
    body = backend.asked[0]
    assert {name: body[name] for name in ("temperature", "top_p", "seed", "max_tokens")} == {
        "temperature": 0.35,
        "top_p": 0.9,
        "seed": 7,
        "max_tokens": 50,
    }
    assert body["messages"][0] == {"role": "system", "content": "Be short."}
    page.click("#show-settings")
    page.fill("[name=seed]", "")
    page.fill("[name=system]", "")
    page.click("#settings button.main")
    ask(page, "hello")
    assert "seed" not in backend.asked[1]
    assert backend.asked[1]["messages"][0]["role"] == "user"


def test_what_is_out_of_range_is_not_saved(page, backend):
    page.click("#show-settings")
    page.fill("[name=temperature]", "-1")
    page.click("#settings button.main")
    assert page.is_visible("#settings"), "the browser says what is wrong"
    page.keyboard.press("Escape")
    ask(page, "hello")
    assert "temperature" not in backend.asked[0]


def test_the_key_is_asked_for(page, backend):
    page.expected = ["401"]
    backend.key = "secret"
    page.reload()
    page.wait_for_selector("#settings[open]")
    assert page.evaluate("document.activeElement.name") == "key"
    page.keyboard.type("secret")
    page.keyboard.press("Enter")
    wait_until(page, "document.querySelector('#model').textContent === 'fake-model'")
    ask(page, "count to 2")
    assert answers(page) == ["1 2"]
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)"), "it is gone with the tab"


def test_errors_are_said(page, backend):
    page.expected = ["429"]
    ask(page, "full")
    assert page.inner_text("#notices") == "The queue is full. Try again in 7 s."
    assert answers(page) == []
    ask(page, "break")
    assert page.inner_text("#notices") == "The caches were given back"
    assert "Not complete" in page.inner_text("article.assistant")


def test_the_runtime_is_shown_live(page, backend):
    ask(page, "count to 9")
    wait_until(page, "/Idle[^]*1,000 reused[^]*copies/.test(document.querySelector('#live').innerText)")
    shown = page.inner_text("#live")
    for words in (
        "Idle",
        "1,234 tokens, 1,000 reused",
        "75 %",
        "20 GB/s of 25 GB/s",
        "copies to the card: 84 %",
        "In host memory: 17.9 GB",  # with that of parked sessions
    ):
        assert words in shown, shown
    meters = page.eval_on_selector_all("[role=meter]", "all => all.map((each) => each.ariaValueText)")
    assert meters == ["75 %", "75 %", "20 GB/s of 25 GB/s"]
    assert "The last pass took 90 ms" in page.get_attribute("#live svg", "aria-label")
    page.click("#live-memory summary")
    ask(page, "count to 3")
    page.wait_for_timeout(900)
    assert page.is_visible("#live-memory dl"), "what has been unfolded stays so"
    page.click("#show-live")
    assert not page.is_visible("#live")


def test_light_and_dark(page):
    ground = "getComputedStyle(document.body).backgroundColor"
    light, dark = "rgb(255, 255, 255)", "rgb(20, 23, 27)"
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(ground) == dark
    page.emulate_media(color_scheme="light")
    assert page.evaluate(ground) == light
    page.click("#theme")
    page.click("#theme")
    assert page.get_attribute("#theme", "aria-label") == "Theme: dark"
    assert page.evaluate(ground) == dark
    page.reload()
    assert page.evaluate(ground) == dark, "it is kept"


WIDE = "| " + " | ".join(["column"] * 30) + " |\n" + "|---" * 30 + "|\n" + "| x " * 30 + "|"


@pytest.mark.parametrize("viewport", [PHONE, DESK], ids=["phone", "desk"])
def test_nothing_is_wider_than_the_screen(page, backend, viewport):
    page.set_viewport_size(viewport)
    long = "w" * 3000
    backend.script["wide"] = (
        f"{long}\n\n```\n{long}\n```\n\n{WIDE}\n\n# {long}\n\n> {long}\n\n[{long[:400]}](https://x.org)"
    )
    drop(page, f"{long[:200]}.txt", "text")
    page.wait_for_selector("#documents .chip")
    ask(page, "wide")
    assert page.query_selector("article table")
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    assert page.evaluate("(box => box.scrollWidth - box.clientWidth)(document.querySelector('#messages'))") == 0
    if viewport is PHONE:
        page.click("#show-live")
        assert page.is_visible("#live")
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    for name in ("New chat", "Runtime", "Settings", "Theme: system"):
        assert page.get_by_role("button", name=name).is_visible()


def test_everything_has_a_name_for_screen_readers(page, backend):
    drop(page, "a.txt", "text")
    page.wait_for_selector("#documents .chip")
    backend.script["show"] = "```python\nx\n```\n\n| a |\n|---|\n| 1 |"
    ask(page, "show")
    page.click("#show-settings")
    nameless = page.eval_on_selector_all(
        "button, input, textarea, [role], progress, pre",
        """all => all.filter((each) => !(each.textContent.trim() || each.ariaLabel || each.labels?.length
            || each.getAttribute("aria-labelledby")) && !["status", "alert"].includes(each.role))
            .map((each) => each.outerHTML)""",
    )
    assert nameless == []
