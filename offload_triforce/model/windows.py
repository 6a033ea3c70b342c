"""Which sliding windows limit anything."""

from __future__ import annotations

from typing import Any


def limiting_window(window: int | None, config: Any) -> int | None:
    """A sliding window, if some text that the model can read is longer; else None: the layer sees everything."""
    positions = getattr(config, "max_position_embeddings", None)
    return None if window is not None and positions is not None and window >= positions else window
