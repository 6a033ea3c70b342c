"""The beginning of a safetensors file, as we write it: what it has to be follows from its tensors' names and shapes.

So a file that is read is not believed: its first bytes are compared with those that belong there. The format: the
header's length in 8 bytes, a JSON object that may end in spaces, the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

ITEMSIZE = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
# Tensors begin on a page, so that they can be mapped and read around the page cache.
PAGE = 4096


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a file. ``dtype``: a key of ITEMSIZE."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


def in_order(tensors: Sequence[TensorEntry]) -> list[TensorEntry]:
    """As they lie in a file: wide numbers first, so that every tensor is aligned."""
    return sorted(tensors, key=lambda tensor: (-ITEMSIZE[tensor.dtype], tensor.name))


def header_of(tensors: Sequence[TensorEntry]) -> bytes:
    """The bytes before the first tensor: whole pages."""
    described, end = {}, 0
    for tensor in in_order(tensors):
        offsets = [end, end + tensor.size]
        described[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        end += tensor.size
    words = json.dumps(described, separators=(",", ":")).encode()
    length = -(-(8 + len(words)) // PAGE) * PAGE - 8
    return length.to_bytes(8, "little") + words.ljust(length)


def size_of(tensors: Sequence[TensorEntry]) -> int:
    """Bytes of the whole file."""
    return len(header_of(tensors)) + sum(tensor.size for tensor in tensors)
