"""Files in a conversation."""

import builtins
import sys
from types import SimpleNamespace

import pytest

from offload_triforce import InputError
from offload_triforce.generation import documents
from offload_triforce.generation.documents import read_document, with_documents


def test_a_text_file(tmp_path, monkeypatch):
    (tmp_path / "a b.py").write_text("x = 1\n")
    found = read_document(str(tmp_path / "a b.py"))
    assert (found.name, found.text) == ("a b.py", "x = 1\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_document("~/a b.py") == found
    assert with_documents([found], "Why?") == '<document name="a b.py">\nx = 1\n</document>\n\nWhy?'
    assert with_documents([found], "") == '<document name="a b.py">\nx = 1\n</document>'
    assert with_documents([], "Why?") == "Why?"


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "empty").write_text("")
    for path, words in (
        (tmp_path / "gone", "no such file"),
        (tmp_path, "is a folder"),
        (sys.executable, "is not UTF-8 text"),
        (tmp_path / "empty", "is empty"),
        ("/dev/zero", "is a device"),
        ("x" * 5000, "cannot be read"),
        ("a\0b", "no such file"),
        ("-", "name a file"),
    ):
        with pytest.raises(InputError, match=words) as error:
            read_document(str(path))
        assert "\n" not in str(error.value)
    monkeypatch.setattr(documents, "MOST_BYTES", 10)
    (tmp_path / "large").write_text("x" * 11)
    with pytest.raises(InputError, match="more than"):
        read_document(str(tmp_path / "large"))


def test_a_pdf_needs_pypdf(tmp_path, monkeypatch):
    path = tmp_path / "a.pdf"
    path.write_bytes(b"%PDF-1.7\n\0\xff")
    monkeypatch.setattr(documents.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="install pypdf"):
        read_document(str(path))
    monkeypatch.setattr(documents.importlib.util, "find_spec", lambda name: object())

    def reader(pages):
        module = SimpleNamespace(PdfReader=lambda file: SimpleNamespace(pages=pages()))
        monkeypatch.setattr(documents.importlib, "import_module", lambda name: module)

    reader(lambda: [SimpleNamespace(extract_text=lambda text=text: text) for text in ("one", "two")])
    assert read_document(str(path)).text == "one\n\ntwo"
    reader(lambda: [SimpleNamespace(extract_text=lambda: " ")])
    with pytest.raises(InputError, match="without text"):
        read_document(str(path))
    reader(lambda: builtins.__dict__["nothing"])
    with pytest.raises(InputError, match="cannot be read: 'nothing'"):
        read_document(str(path))
