"""Where things are kept on this machine."""

from __future__ import annotations

import os
import re
from pathlib import Path

from offload_triforce.errors import InputError

_HOME = ".cache/offload-triforce"
_NAME = re.compile(r"[\w][\w.+-]{0,99}")


def cache_folder() -> Path:
    """Where models are kept: $OFFLOAD_TRIFORCE_CACHE, or ~/.cache/offload-triforce/models."""
    return Path(os.environ.get("OFFLOAD_TRIFORCE_CACHE") or Path.home() / _HOME / "models")


def sessions_folder() -> Path:
    """Where sessions are kept by name: $OFFLOAD_TRIFORCE_SESSIONS, or ~/.cache/offload-triforce/sessions."""
    return Path(os.environ.get("OFFLOAD_TRIFORCE_SESSIONS") or Path.home() / _HOME / "sessions")


def session_folder(name: str) -> Path:
    """Where the session of that name is kept, or would be.

    Raises:
        InputError: it cannot be a name.
    """
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{name!r} cannot be the name of a session; take letters, digits and . _ + - (at most 100, a letter or "
            "digit first)"
        )
    return sessions_folder() / name


def history_file() -> Path:
    """What was typed in conversations, for the arrow keys: ~/.cache/offload-triforce/chat_history."""
    return Path.home() / _HOME / "chat_history"
