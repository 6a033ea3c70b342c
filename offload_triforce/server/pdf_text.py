"""A program by itself: a PDF on its standard input, {"text", "pages"} or {"error", "status"} on its output, as JSON.

It imports nothing of this package, so that it starts at once, and so that what a PDF can do to it harms nothing else.
"""

from __future__ import annotations

import io
import json
import sys
from typing import Any

MEMORY = 2_000_000_000  # bytes of address space
SECONDS = 60  # of computation
MOST_CHARACTERS = 16_000_000


def limit() -> None:
    """Let the system end this process where it takes too much. There is no such thing on Windows."""
    try:
        import resource
    except ImportError:
        return
    for kind, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_FSIZE, 0)):
        resource.setrlimit(kind, (most, most))


def read(data: bytes) -> dict[str, Any]:
    """The text of all pages, an empty line between two of them."""
    try:
        from pypdf import PdfReader
    except ImportError:
        return {"error": "This server cannot read PDF; `pip install pypdf` there", "status": 501}
    try:
        reader = PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            return {"error": "The PDF is locked by a password", "status": 422}
        texts, length = [], 0
        for page in reader.pages:
            # Broken fonts give lone surrogates, which are no text.
            texts.append(page.extract_text().strip().encode("utf-8", "replace").decode())
            length += len(texts[-1])
            if length > MOST_CHARACTERS:
                return {"error": f"The PDF holds more than {MOST_CHARACTERS:,} characters of text", "status": 413}
    except Exception as error:  # a PDF can be wrong in any way
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return {"error": f"The PDF could not be read: {reason}", "status": 422}
    text = "\n\n".join(filter(None, texts))
    if not text:
        return {"error": f"There is no text in the {len(texts)} pages of the PDF, only pictures", "status": 422}
    return {"text": text, "pages": len(texts)}


if __name__ == "__main__":
    limit()
    sys.stdout.write(json.dumps(read(sys.stdin.buffer.read())))
