"""What a coded tile looks like: how long it is, and where its parts lie."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

BLOCK = 64  # tokens that share a largest exponent
GROUP = 8  # tokens whose bits lie in one byte
ALIGNMENT = 256  # bytes
# Room for escapes, as a share of all values.
ROOM = 0.03
MANTISSA = {torch.bfloat16: 7, torch.float16: 10}  # bits


@dataclass(frozen=True)
class WireFormat:
    """The coded form of one tile [2, K, tile_tokens, D]: always the same number of bytes.

    Args:
        kv_heads: K. tile_tokens: a multiple of 8. head_dim: D. dtype: bfloat16 or float16.
    """

    kv_heads: int
    tile_tokens: int
    head_dim: int
    dtype: torch.dtype

    @staticmethod
    def serves(tile_tokens: int, dtype: torch.dtype) -> bool:
        """Whether tiles of so many tokens, of this type, can be coded."""
        return dtype in MANTISSA and tile_tokens > 0 and tile_tokens % GROUP == 0

    def __post_init__(self) -> None:
        if not self.serves(self.tile_tokens, self.dtype):
            raise ValueError(f"tiles of {self.tile_tokens} tokens of {self.dtype} cannot be coded")

    @property
    def values(self) -> int:
        """Numbers in a tile."""
        return 2 * self.kv_heads * self.tile_tokens * self.head_dim

    @property
    def raw_bytes(self) -> int:
        """Bytes of a tile as it is."""
        return self.values * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """Bytes of a coded tile."""
        return self.offsets[-1]

    @property
    def ratio(self) -> float:
        """Raw bytes over coded bytes."""
        return self.raw_bytes / self.bytes

    @property
    def regions(self) -> int:
        """Blocks of all channels of one head: what one program works on."""
        return 2 * self.kv_heads * math.ceil(self.tile_tokens / BLOCK)

    @property
    def room(self) -> int:
        """Escapes that a tile has room for."""
        return math.ceil(self.values * ROOM)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where the parts begin, in bytes: starts, tops, codes, rests, high bits of rests, escapes; and the end."""
        high = MANTISSA[self.dtype] - 7
        sizes = (
            8,
            4 * self.regions,
            self.regions * self.head_dim,
            self.values // GROUP * 3,
            self.values,
            self.values // GROUP * high,
            self.room,
        )
        found = [0]
        for size in sizes:
            found.append(found[-1] + math.ceil(size / ALIGNMENT) * ALIGNMENT)
        return tuple(found[1:])
