"""Where things are kept on this machine."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where models are kept: $OFFLOAD_TRIFORCE_CACHE, or ~/.cache/offload-triforce/models."""
    return Path(os.environ.get("OFFLOAD_TRIFORCE_CACHE") or Path.home() / ".cache/offload-triforce/models")
