"""Lossless long-context decoding on one consumer GPU.

The full KV cache lives in host memory and is streamed over the link; TriForce's hierarchical speculation makes
each of those passes yield many tokens.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from offload_triforce._version import __version__

if TYPE_CHECKING:
    from offload_triforce.config import Settings
    from offload_triforce.engine import TriForce
    from offload_triforce.errors import (
        BusyError,
        InputError,
        MemoryLimitError,
        StorageError,
        TriForceError,
        UnsupportedModelError,
    )
    from offload_triforce.generation.answer import Generation, TextStream
    from offload_triforce.integrations.transformers import triforce_generate
    from offload_triforce.runtime.conversation import Session
    from offload_triforce.speculation.grammar import GrammarProcessor
    from offload_triforce.speculation.processors import forkable, stateless

# Imported on first use, so that `offload-triforce --help` does not wait for torch.
_HOMES = {
    "Settings": "config",
    "Generation": "generation.answer",
    "TextStream": "generation.answer",
    "TriForce": "engine",
    "BusyError": "errors",
    "InputError": "errors",
    "MemoryLimitError": "errors",
    "StorageError": "errors",
    "TriForceError": "errors",
    "UnsupportedModelError": "errors",
    "triforce_generate": "integrations.transformers",
    "Session": "runtime.conversation",
    "GrammarProcessor": "speculation.grammar",
    "forkable": "speculation.processors",
    "stateless": "speculation.processors",
}

__all__ = [
    "BusyError",
    "Generation",
    "GrammarProcessor",
    "InputError",
    "MemoryLimitError",
    "Session",
    "Settings",
    "StorageError",
    "TextStream",
    "TriForce",
    "TriForceError",
    "UnsupportedModelError",
    "__version__",
    "forkable",
    "stateless",
    "triforce_generate",
]


if not TYPE_CHECKING:  # a type checker knows the names from above, and shall complain of any other

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
