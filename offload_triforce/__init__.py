"""Lossless long-context decoding on one consumer GPU.

The full KV cache lives in host memory and is streamed over the link; TriForce's hierarchical speculation makes
each of those passes yield many tokens.
"""

from offload_triforce._version import __version__
from offload_triforce.config import Settings
from offload_triforce.engine import Generation, TextStream, TriForce
from offload_triforce.errors import InputError, MemoryLimitError, TriForceError, UnsupportedModelError
from offload_triforce.hf import triforce_generate

__all__ = [
    "Generation",
    "InputError",
    "MemoryLimitError",
    "Settings",
    "TextStream",
    "TriForce",
    "TriForceError",
    "UnsupportedModelError",
    "__version__",
    "triforce_generate",
]
