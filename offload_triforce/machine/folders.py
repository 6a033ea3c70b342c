"""Where things are kept on this machine."""

from __future__ import annotations

import os
from pathlib import Path

_CHOSEN = "OFFLOAD_TRIFORCE_CACHE"


def cache_folder() -> Path:
    """Where models are kept: $OFFLOAD_TRIFORCE_CACHE, or ~/.cache/offload-triforce/models."""
    return Path(os.environ.get(_CHOSEN) or Path.home() / ".cache/offload-triforce/models")


def sessions_folder() -> Path:
    """Where named sessions are kept: ``sessions`` in $OFFLOAD_TRIFORCE_CACHE, or in ~/.cache/offload-triforce."""
    return Path(os.environ.get(_CHOSEN) or Path.home() / ".cache/offload-triforce") / "sessions"


def history_file() -> Path:
    """What was typed in conversations: ``chat_history`` in $OFFLOAD_TRIFORCE_CACHE, or in ~/.cache/offload-triforce."""
    return Path(os.environ.get(_CHOSEN) or Path.home() / ".cache/offload-triforce") / "chat_history"
