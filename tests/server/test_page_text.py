"""What a model writes is shown as it is, and never run: Markdown, and attacks, in a real browser."""

import pytest

pytest.importorskip("fastapi", reason="needs fastapi: pip install 'offload-triforce[serve]'")
pytest.importorskip("uvicorn", reason="needs uvicorn: pip install 'offload-triforce[serve]'")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.server.browsing import wait_until
from tests.server.fake_backend import Backend, make_app, serve

pytestmark = pytest.mark.browser

# Draws a text in a box of its own, and returns the box's HTML, its text, and how long it took.
DRAW = """async (text) => {
    const { draw } = await import("/markdown.js");
    const box = document.createElement("div");
    document.body.append(box);
    const began = performance.now();
    draw(box, text);
    const found = { html: box.innerHTML, text: box.textContent, ms: performance.now() - began,
        tags: [...new Set([...box.querySelectorAll("*")].map((each) => each.tagName.toLowerCase()))],
        links: [...box.querySelectorAll("a")].map((each) => [each.getAttribute("href"), each.rel]),
        attributes: [...new Set([...box.querySelectorAll("*")].flatMap((each) => each.getAttributeNames()))] };
    box.remove();
    return found;
}"""
BLOCKS = {"p", "h3", "h4", "h5", "h6", "hr", "div", "pre", "blockquote", "ul", "ol", "li", "span", "button"}
TAGS = BLOCKS | {"table", "thead", "tbody", "tr", "th", "td", "code", "br", "a", "strong", "em", "del"}
ATTRIBUTES = {"class", "href", "rel", "target", "title", "start", "role", "aria-label", "tabindex", "type"}


@pytest.fixture(scope="module")
def served():
    backend = Backend()
    with serve(make_app(backend)) as address:
        yield backend, address


@pytest.fixture(scope="module")
def page(chromium, served):
    context = chromium.new_context()
    page = context.new_page()
    page.complaints = []
    page.on("console", lambda said: said.type == "error" and page.complaints.append(said.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("dialog", lambda dialog: page.complaints.append(dialog.message) or dialog.dismiss())
    page.goto(served[1])
    wait_until(page, "document.querySelector('#model').textContent !== ''")
    yield page
    context.close()
    assert page.complaints == []


@pytest.mark.parametrize(
    ("text", "html"),
    [
        (
            "**a** *b* ***c*** ~~d~~ __e__ _f_",
            "<p><strong>a</strong> <em>b</em> <strong><em>c</em></strong> <del>d</del> <strong>e</strong> "
            "<em>f</em></p>",
        ),
        ("snake_case_name 2 * 3 * 4 ** 5", "<p>snake_case_name 2 * 3 * 4 ** 5</p>"),
        ("`a *b* <i>` and ``c ` d``", "<p><code>a *b* &lt;i&gt;</code> and <code>c ` d</code></p>"),
        ("one\ntwo", "<p>one<br>two</p>"),
        ("# A #\n### B", "<h3>A</h3><h5>B</h5>"),
        ("> a\n> b", "<blockquote><p>a<br>b</p></blockquote>"),
        ("- a\n  - b\n- c", "<ul><li>a<ul><li>b</li></ul></li><li>c</li></ul>"),
        ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
        ("1. a\n\n   more\n\n2. b", '<ol start="1"><li><p>a</p><p>more</p></li><li>b</li></ol>'),
        ("a\n\n---\n\nb", "<p>a</p><hr><p>b</p>"),
        (r"\*not\* \[so\]", "<p>*not* [so]</p>"),
        ("**open", "<p>**open</p>"),
        ("<b>&amp;</b>", "<p>&lt;b&gt;&amp;amp;&lt;/b&gt;</p>"),
        ("*a **b* c**", "<p><em>a **b</em> c**</p>"),
    ],
)
def test_markdown(page, text, html):
    assert page.evaluate(DRAW, text)["html"] == html


def test_code_and_tables(page):
    found = page.evaluate(DRAW, "```python\nif a < b:\n    **x**\n```\n\n| a | b |\n|--:|:-:|\n| 1 | `x|y` |\n| 2 |")
    assert "if a &lt; b:\n    **x**" in found["html"]
    assert 'aria-label="Code, python"' in found["html"]
    assert '<td class="right">2</td><td class="middle"></td>' in found["html"]
    unfinished = page.evaluate(DRAW, "text\n\n```\n# still coming")
    assert "<h3>" not in unfinished["html"]
    assert "# still coming" in unfinished["text"]


SAFE = [
    ("[a](https://x.org/b)", "https://x.org/b"),
    ('[a](https://x.org/b_(c) "title")', "https://x.org/b_(c)"),
    ("<https://x.org>", "https://x.org/"),
    ("see https://x.org/a, and", "https://x.org/a"),
    ("[mail](mailto:a@b.org)", "mailto:a@b.org"),
    ("![picture](https://x.org/p.png)", "https://x.org/p.png"),
]


@pytest.mark.parametrize(("text", "address"), SAFE)
def test_links(page, text, address):
    assert page.evaluate(DRAW, text)["links"] == [[address, "noopener noreferrer nofollow"]]


ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
    "<a href='javascript:alert(1)'>x</a>",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert`1`)",
    "[x](&#106;avascript:alert(1))",
    "[x](\x01javascript:alert(1))",
    "[x](java\tscript:alert(1))",
    "[x](vbscript:x)",
    "[x](data:text/html,<script>alert(1)</script>)",
    "[x](data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==)",
    "[x](file:///etc/passwd)",
    "[x](blob:https://x.org/1)",
    "[x](//x.org)",
    "[x](/page/pdf)",
    "[x](?a=b)",
    "![x](javascript:alert(1))",
    "<javascript:alert(1)>",
    '[x](https://x.org/"onmouseover=alert(1))',
    "```<script>alert(1)</script>\n</code></pre><script>alert(1)</script>\n```",
    '```" onclick=alert(1) x="\nx\n```',
    "|<script>alert(1)</script>|\n|---|\n|<img src=x onerror=alert(1)>|",
    "# <style>*{display:none}</style>",
    "<form action=https://x.org><input name=key></form>",
    "<!--",
    "<![CDATA[",
    "\0<script>",
    "</div></article></main>",
    "<template>",
    "<base href=https://x.org>",
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_stay_text(page, attack):
    found = page.evaluate(DRAW, attack)
    assert set(found["tags"]) <= TAGS
    assert set(found["attributes"]) <= ATTRIBUTES
    assert all(address.startswith(("https://x.org/", "mailto:")) for address, _ in found["links"])
    for mark in ("alert(1)", "javascript:", "<script>"):
        if mark in attack and not attack.startswith("```"):
            assert mark in found["text"] or found["links"], "it is seen as it was written"


def test_attacks_by_the_whole_way(page, served):
    """Streamed, drawn, kept, and drawn again after a reload."""
    backend = served[0]
    backend.script["attack"] = "\n\n".join(ATTACKS)
    page.fill("#question", "attack")
    page.press("#question", "Enter")
    for again in (False, True):
        if again:
            page.reload()
        page.wait_for_selector("#send:visible")
        shown = page.inner_text("article.assistant > .text")
        assert "<script>alert(1)</script>" in shown
        assert "[x](javascript:alert(1))" in shown
        assert (
            page.eval_on_selector_all(
                "article script, article img, article iframe, article svg, article style", "all => all.length"
            )
            == 0
        )
    page.wait_for_timeout(200)
    assert page.complaints == []
    page.click("#new-chat")


MARKS = st.sampled_from(
    [
        *"*_`~[]()!<>|#->:.\\\n\t \0",
        "\n\n",
        "```",
        "**",
        "1. ",
        "- ",
        "> ",
        "| a |",
        "|---|",
        "<b>",
        "](",
        "javascript:",
        "https://x.org/",
        "data:",
        "é",
        "🙂",
        "\u202e",
        "word",
    ]
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(MARKS, max_size=60).map("".join))
def test_any_text_stays_text(page, text):
    found = page.evaluate(DRAW, text)
    assert set(found["tags"]) <= TAGS
    assert set(found["attributes"]) <= ATTRIBUTES
    assert all(address.startswith("https://") for address, _ in found["links"])
    assert (
        all(word in found["text"] for word in ("word", "é", "🙂") if word in text.replace("```", " ")) or "```" in text
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(MARKS, min_size=1, max_size=40))
def test_growing_text_is_drawn_as_at_once(page, pieces):
    """Blocks that stand there already are the ones that would be made."""
    grown, whole = page.evaluate(
        """async (pieces) => {
            const { draw } = await import("/markdown.js");
            const [grown, whole] = [document.createElement("div"), document.createElement("div")];
            pieces.forEach((_, i) => draw(grown, pieces.slice(0, i + 1).join("")));
            draw(whole, pieces.join(""));
            return [grown.innerHTML, whole.innerHTML];
        }""",
        pieces,
    )
    assert grown == whole


HUGE = {
    "a line": "x" * 500_000,
    "brackets": "[" * 100_000,
    "links that do not end": "[a](" * 50_000,
    "stars": "*a " * 60_000,
    "a run of stars": "*" * 100_000,
    "backticks": " ".join("`" * (1 + i % 50) for i in range(10_000)),
    "quotations": ">" * 1_900 + "x",
    "many quotations": (">" * 1_900 + "\n") * 40,
    "lists": "".join(" " * 2 * i + "- x\n" for i in range(400)),
    "a rule that is none": ("- " * 900 + "x\n") * 50,
    "headings of spaces": ("# a" + " " * 1_900 + "b\n") * 50,
    "a table of bars": "|" * 1_900 + "\n" + "|-" * 900 + "\n",
    "fences": "```\n" * 8_000,
    "addresses": "https://" * 10_000,
    "angles": "<https://x" * 10_000,
    "escapes": "\\" * 200_000,
}


@pytest.mark.parametrize("name", HUGE)
def test_hostile_sizes_do_not_hang_the_page(page, name):
    """Time grows with the length alone: what is quadratic takes minutes here, and the browser gives up."""
    page.set_default_timeout(20_000)
    found = page.evaluate(DRAW, HUGE[name])
    assert set(found["tags"]) <= TAGS


def test_hidden_characters_turn_no_text_around(page):
    """Marks of direction are within their own message, so the page around it reads as before."""
    assert page.evaluate(DRAW, "a\u202eb")["text"] == "a\u202eb"
