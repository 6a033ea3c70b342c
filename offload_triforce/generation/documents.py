"""Documents that a conversation is about: a file's text, and how it stands in a message."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from offload_triforce.errors import InputError, first_line
from offload_triforce.generation.prompt import read_text

MOST_BYTES = 64 << 20  # more than a million tokens of any text


@dataclass(frozen=True)
class Document:
    """``name``: of the file, without its folder. ``text``: of it."""

    name: str
    text: str


def read_document(path: str) -> Document:
    """A text file, or the text of a PDF where pypdf is installed.

    Raises:
        InputError: there is none, it is no text, or it is too large.
    """
    if path == "-":
        raise InputError("standard input is the conversation's own; name a file")
    if "\0" in path:
        raise InputError(f"no such file: {path!r}")
    file = Path(os.path.expanduser(path))
    try:
        size = file.stat().st_size
        with open(file, "rb") if file.is_file() else open(os.devnull, "rb") as opened:
            is_pdf = opened.read(5) == b"%PDF-"
    except (OSError, ValueError):
        size, is_pdf = 0, False  # what is wrong with it is said below
    if size > MOST_BYTES:
        raise InputError(
            f"{path} has {size / 1e6:,.0f} MB, more than the {MOST_BYTES / 1e6:.0f} MB of text that are read"
        )
    text = _pdf_text(path, file) if is_pdf else read_text(path)
    return Document(file.name, text)


def with_documents(documents: Sequence[Document], question: str) -> str:
    """One message: the documents, each between marks that carry its name, and then the question."""
    parts = [f'<document name="{each.name}">\n{each.text.strip()}\n</document>' for each in documents]
    return "\n\n".join([*parts, question] if question.strip() else parts)


def _pdf_text(path: str, file: Path) -> str:
    if importlib.util.find_spec("pypdf") is None:
        raise InputError(f"{path} is a PDF; install pypdf to have it read, or make a text of it first (pdftotext)")
    try:
        pages = importlib.import_module("pypdf").PdfReader(file).pages
        text = "\n\n".join(page.extract_text() for page in pages)
    except Exception as error:  # a damaged file may make the reader raise anything
        raise InputError(f"{path} is a PDF that cannot be read: {first_line(error)}") from error
    if not text.strip():
        raise InputError(f"{path} is a PDF without text, of scanned pages maybe; only text can be read")
    return text
