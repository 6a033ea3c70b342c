"""Tiles with fewer bytes, and nothing lost: what a coded tile holds, how long it is, and where its parts lie.

Signs and mantissas are noise and stay as they are; exponents of one channel lie close together. Of each *block* (64
tokens of one channel) one byte is kept, its *level*: an exponent such that itself and the two below it are as frequent
as three neighbours can be. These three have 2-bit codes. The fourth code is a *miss*, which an *extension* of 3 bits
explains: seven more exponents around the level, and an *escape*, whose exponent is written out in 8 bits.

A *region* is all channels of one head's block, and has one program to itself. Where an extension lies follows from
how many misses come before it in its region, so all values of a region are decoded side by side. In what order they
count: by group of 8 tokens, channel, token.

Extensions and escapes of a region are as many as they are. All regions of a tile share one *room* for them, which has a
fixed size: it makes the rate. A tile that needs more stays raw.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 64  # tokens
GROUP = 8  # tokens, whose bits lie in one byte
NEAR = 3  # exponents with a code of their own; that number is a miss
LEVELS = 5  # how far below the block's largest exponent its level may lie, and one
EXTENSION = 3  # bits
ESCAPE = 7  # the extension of what is written out
ALIGNMENT = 256  # bytes, of the whole
PART_ALIGNMENT = 16  # bytes
ROOM = 0.107  # bytes per value for extensions and escapes: real keys and values take 0.083 to 0.106
MANTISSA = {torch.bfloat16: 7, torch.float16: 10}  # bits
HEADER = 16  # bytes


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
        return _rounded(self.begins[-1] + self.room, ALIGNMENT)

    @property
    def ratio(self) -> float:
        """Raw bytes over coded bytes."""
        return self.raw_bytes / self.bytes

    @property
    def blocks(self) -> int:
        """Blocks of a channel; the last may be shorter."""
        return math.ceil(self.tile_tokens / BLOCK)

    @property
    def regions(self) -> int:
        """Regions of a tile, in the order of part (K or V), head, block."""
        return 2 * self.kv_heads * self.blocks

    @property
    def mantissa(self) -> int:
        """Bits of a mantissa."""
        return MANTISSA[self.dtype]

    @property
    def high_bits(self) -> int:
        """Bits of sign and mantissa that no byte has room for."""
        return self.mantissa - 7

    @property
    def room(self) -> int:
        """Bytes for extensions and escapes."""
        return math.ceil(self.values * ROOM)

    @property
    def begins(self) -> tuple[int, int, int, int, int, int]:
        """Where the parts begin, in bytes: sizes and starts of regions, levels, codes, rests, their high bits, room."""
        sizes = (8 * self.regions, self.regions * self.head_dim, self.values // 4, self.values)
        found = [HEADER]
        for size in (*sizes, self.values // GROUP * self.high_bits):
            found.append(_rounded(found[-1] + size, PART_ALIGNMENT))
        return tuple(found)


class Parts(NamedTuple):
    """Views of a coded tile.

    Attributes:
        header: int32 [2]. How many bytes found no room (0: it can be decoded), and how many bytes are in use.
        sizes, starts: int32 [regions]. How many bytes of the room a region takes, and where they begin.
        levels: uint8 [2, K, blocks, D].
        codes: uint8 [2, K, T / 8, 2, D]. Low and high bits of the codes of 8 tokens; bit t is of the t-th.
        rests: uint8 [2, K, T, D]. Sign and mantissa; float16: the low 8 of these 11 bits.
        highs: uint8 [2, K, T / 8, 3, D]. The 3 higher ones, laid out as codes; None for bfloat16.
        room: uint8 [room]. Of each region its extensions, 3 bits each, low bits first, and, from the next whole byte
            on, its escapes.
    """

    header: Tensor
    sizes: Tensor
    starts: Tensor
    levels: Tensor
    codes: Tensor
    rests: Tensor
    highs: Tensor | None
    room: Tensor


def parts(coded: Tensor, format: WireFormat) -> Parts:
    """The parts of a coded tile (uint8 [format.bytes])."""
    heads, tokens, dim, values, high = format.kv_heads, format.tile_tokens, format.head_dim, format.values, 0
    regions, levels, codes, rests, highs, room = format.begins
    high = format.high_bits
    tables = coded[regions : regions + 8 * format.regions].view(torch.int32).view(2, -1)
    return Parts(
        coded[:8].view(torch.int32),
        tables[0],
        tables[1],
        coded[levels : levels + format.regions * dim].view(2, heads, -1, dim),
        coded[codes : codes + values // 4].view(2, heads, -1, 2, dim),
        coded[rests : rests + values].view(2, heads, tokens, dim),
        coded[highs : highs + values // GROUP * high].view(2, heads, -1, high, dim) if high else None,
        coded[room : room + format.room],
    )


def _rounded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
