"""Reading the configuration in a GGUF file without its vocabulary, which takes the reader most of its time.

transformers rebuilds a configuration from all entries of the header, and the gguf package makes objects of every one of
some 300,000 texts on the way: seven seconds for a vocabulary of 150,000 tokens. How many there are is all that a
configuration needs to know of them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gguf
from gguf import GGUFReader, GGUFValueType

# Arrays longer than this are skipped: those that say something of each layer are far shorter.
LONG = 4096


class _Skimmer(GGUFReader):
    """Long arrays hold their first element, over and over."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[GGUFValueType]]:
        if raw_type == GGUFValueType.ARRAY and self.byte_order == "I":
            try:
                kind, length = struct.unpack_from("<IQ", self.data, orig_offs)
                if length > LONG and kind != GGUFValueType.ARRAY:
                    return self._first_of(orig_offs, kind, length)
            except struct.error as error:
                raise ValueError(f"the header ends within a list: {error}") from error
        return super()._get_field_parts(orig_offs, raw_type)

    def _first_of(self, at: int, kind: int, length: int) -> tuple[int, list[Any], list[int], list[GGUFValueType]]:
        start = at + struct.calcsize("<IQ")
        first, parts, where, types = super()._get_field_parts(start, kind)
        end = start + first * length
        if kind == GGUFValueType.STRING:
            end = start
            for _ in range(length):
                end += 8 + struct.unpack_from("<Q", self.data, end)[0]
        return end - at, parts, where * length, [GGUFValueType.ARRAY, *types]


@contextmanager
def skimming() -> Iterator[None]:
    """While this lasts, GGUF files are read without their long arrays: for all but tokenizers."""
    before, gguf.GGUFReader = gguf.GGUFReader, _Skimmer
    try:
        yield
    finally:
        gguf.GGUFReader = before
