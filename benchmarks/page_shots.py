"""Pictures of the server's page for the documentation: a real engine over an emulated link, driven by a real browser.

    python -m benchmarks.page_shots [--model smollm2] [--link-gbps 0.4] [--out docs]

It serves the model, drops a document on the page, asks about it, and takes a picture while the answer comes: a wide one
in light colours, a narrow one in dark. Needs playwright and a Chromium (``TRIFORCE_TEST_BROWSER`` names another one).
"""

from __future__ import annotations

import argparse
import io
import threading
import time
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from offload_triforce import TriForce
from offload_triforce.server.app import make_app
from offload_triforce.server.options import ServerOptions
from offload_triforce.server.serving import make_server
from tests.server.browsing import find_browser, wait_until

ROOT = Path(__file__).parent.parent
QUESTION = "Write a short summary of this document as a list."
PASSES = 16  # after which the pictures are taken
COLOURS = 128  # of a picture: few colours make a small file
# name -> (width, height, colour scheme)
SHOTS = {"page_light.png": (1280, 860, "light"), "page_dark.png": (390, 760, "dark")}


def shoot(browser: Browser, address: str, document: Path, folder: Path) -> None:
    """Ask once, and take all pictures of that answer."""
    width, height, scheme = SHOTS["page_light.png"]
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    page.set_default_timeout(120_000)
    page.goto(address)
    page.set_input_files("#file", document)
    page.wait_for_selector("#documents .chip")
    page.fill("#question", QUESTION)
    page.press("#question", "Enter")
    page.wait_for_selector("article.assistant .text > *")
    page.wait_for_selector("#live rect.in")
    wait_until(
        page, f"Number(/in ([\\d]+) passes/.exec(document.querySelector('#live').innerText)?.[1]) >= {PASSES}", 100
    )
    for name, (width, height, scheme) in SHOTS.items():
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": height})
        page.wait_for_timeout(2000)
        write(page.screenshot(), folder / name)
    page.close()


def write(data: bytes, path: Path) -> None:
    """Keep a picture, small."""
    picture = Image.open(io.BytesIO(data)).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    picture.save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--link-gbps", type=float, default=0.4)
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "limits.md")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    given = parser.parse_args()
    settings = {
        "link_gbps": given.link_gbps,
        "tile": 64,
        "budget": 256,
        "resident": 0.0,
    }  # small ones: else a short text stays on the card
    with TriForce.load(given.model, **settings) as engine, sync_playwright() as playwright:
        options = ServerOptions(names=(given.model,), port=0)
        server = make_server(make_app(engine, options), options, "warning")
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            while not server.started:
                time.sleep(0.05)
            address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
            # In a container, root has no sandbox for a browser; it sees nothing but our own page.
            browser = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
            shoot(browser, address, given.document, given.out)
            browser.close()
        finally:
            server.should_exit = True
            thread.join()


if __name__ == "__main__":
    main()
