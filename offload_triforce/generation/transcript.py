"""A conversation's messages in a file of their own, beside what a session keeps: it is readable without any model."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from offload_triforce.errors import InputError, StorageError

FILE = "messages.json"
FORMAT = 1
MOST_BYTES = 1 << 28
ROLES = ("system", "user", "assistant")


def write_messages(folder: Path, messages: Sequence[dict[str, Any]], model: str) -> None:
    """Write the messages to a session's folder; an older file there stays whole until the new one is.

    ``model``: what it was called, for people.

    Raises:
        StorageError: it cannot be written.
    """
    text = json.dumps({"format": FORMAT, "model": model, "messages": list(messages)}, ensure_ascii=False, indent=1)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _beside(folder / FILE) as (file, name):
            file.write(text.encode("utf-8", "replace"))
            file.flush()
            os.fsync(file.fileno())
            os.replace(name, folder / FILE)
    except OSError as error:
        raise StorageError(f"the messages cannot be kept in {folder}: {error.strerror or error}") from error


def read_messages(folder: Path) -> list[dict[str, Any]]:
    """The messages of a session's folder; [] if it has none.

    Raises:
        InputError: what is there are no messages. StorageError: it cannot be read.
    """
    path = folder / FILE
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"{path} has more than {MOST_BYTES / 1e6:.0f} MB, which no conversation has")
        kept = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged: it is not JSON ({error})") from error
    if not isinstance(kept, dict) or kept.get("format") != FORMAT:
        version = kept.get("format") if isinstance(kept, dict) else None
        raise InputError(f"{path} has the format {version!r}; this version reads {FORMAT}")
    return _checked(path, kept.get("messages"))


def _checked(path: Path, messages: object) -> list[dict[str, Any]]:
    """Messages in turns: maybe the system's, then the user's and the assistant's, two by two."""
    if not isinstance(messages, list):
        raise InputError(f"{path} is damaged: it holds no list of messages")
    checked = []
    for number, message in enumerate(messages, 1):
        texts = (message.get("content"), message.get("reasoning_content", "")) if isinstance(message, dict) else (None,)
        if not all(isinstance(text, str) for text in texts) or message.get("role") not in ROLES:
            raise InputError(f"{path} is damaged: message {number} has no role or no text")
        checked.append({key: message[key] for key in ("role", "content", "reasoning_content") if key in message})
    turns = [message["role"] for message in checked if message is not checked[0] or message["role"] != "system"]
    if turns != ["user", "assistant"] * (len(turns) // 2):
        raise InputError(f"{path} is damaged: questions and answers do not come in turns")
    return checked


@contextlib.contextmanager
def _beside(path: Path) -> Any:
    """A new file in the same folder, gone at the end unless it has been renamed: (file, its name)."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            yield file, file.name
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file.name)
