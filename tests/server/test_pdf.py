"""A PDF becomes text in a process of its own; what is wrong with it is said, and harms nothing else."""

import time
import zlib

import httpx
import pytest

pytest.importorskip("fastapi", reason="needs fastapi: pip install 'offload-triforce[serve]'")
pytest.importorskip("httpx", reason="fastapi's test client needs httpx")
pytest.importorskip("pypdf", reason="needs pypdf: pip install pypdf")

from fastapi import FastAPI
from fastapi.testclient import TestClient

from offload_triforce.server import pdf
from offload_triforce.server.pdf import pdf_router
from tests.server.conftest import serving


def make_pdf(*pages, stream=None, packed=False):
    """A PDF by hand: each page shows one line of text."""
    count = len(pages)
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(count))
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", f"<< /Type /Pages /Kids [{kids}] /Count {count} >>"]
    objects.append("<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>")
    for i, text in enumerate(pages):
        shown = stream or f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode("latin-1")
        data, kind = (shown, " /Filter /FlateDecode") if packed else (shown, "")
        what = "/Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Resources << /Font << /F1 3 0 R >> >>"
        objects.append(f"<< {what} /Contents {5 + 2 * i} 0 R >>")
        objects.append(f"<< /Length {len(data)}{kind} >>\nstream\n".encode() + data + b"\nendstream")
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += f"{number} 0 obj\n".encode() + (body if isinstance(body, bytes) else body.encode()) + b"\nendobj\n"
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    return (
        out
        + (
            f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}"
            f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{len(out)}\n%%EOF\n"
        ).encode()
    )


def client(**limits):
    app = FastAPI()
    app.include_router(pdf_router(**limits))
    return TestClient(app)


def refused(response, status):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error["message"]


def test_text_of_all_pages():
    response = client().post("/page/pdf", content=make_pdf("First page", "Caf\xe9"))
    assert response.json() == {"text": "First page\n\nCaf\xe9", "pages": 2}


def test_what_is_no_pdf():
    for data in (b"", b"hello", b"%PDF-1.4\n", make_pdf("x")[:200]):
        assert "could not be read" in refused(client().post("/page/pdf", content=data), 422)


def test_without_text():
    assert "only pictures" in refused(client().post("/page/pdf", content=make_pdf("")), 422)


def test_too_large_whatever_the_head_says():
    over = refused(client(most_bytes=1000).post("/page/pdf", content=b"x" * 1001), 413)
    assert "larger than 0.001 MB" in over
    streamed = client(most_bytes=1000).post("/page/pdf", content=iter([b"x" * 600, b"x" * 600]))
    refused(streamed, 413)


def test_a_file_that_does_not_arrive(engine):
    """By the server itself: the page's limit is that of all bodies."""

    def dripping():
        for _ in range(50):
            yield b"%"
            time.sleep(0.1)

    with serving(engine, read_seconds=0.3) as (address, _):
        answer = httpx.post(f"{address}/page/pdf", content=dripping(), timeout=60)
    assert "did not arrive within 0.3 s" in refused(answer, 408)


def test_too_slow(monkeypatch, tmp_path):
    slow = tmp_path / "slow.py"
    slow.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(pdf, "READER", slow)
    assert "within 0.3 s" in refused(client(most_seconds=0.3).post("/page/pdf", content=b"%PDF"), 422)


def test_a_reader_that_dies(monkeypatch, tmp_path):
    dies = tmp_path / "dies.py"
    dies.write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.setattr(pdf, "READER", dies)
    assert "more memory or time" in refused(client().post("/page/pdf", content=b"%PDF"), 422)


def test_a_bomb():
    """A quarter of a megabyte that unfolds to 250."""
    packer = zlib.compressobj()
    packed = b"".join([*(packer.compress(b" " * 1_000_000) for _ in range(250)), packer.flush()])
    bomb = make_pdf("", stream=packed, packed=True)
    assert len(bomb) < 300_000
    assert client().post("/page/pdf", content=bomb).status_code == 422
