"""How the attention kernels cut their work: found by compiling, see ``aot``, and settled in pure Python.

A block of 16 or 32 rows waits for memory, so its warps share out the keys and the head dimension. Larger blocks wait
for the tensor cores: each warp has 16 rows of its own, so that the queries stay in registers and a softmax row within
a warp. Triton cuts it that way where no part of the head dimension is wider than the block has rows, hence the parts.
They also spare a head dimension of 80, 96 or 192 the padding to a power of two.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

# The largest head dimension for which a block's running sums fit into registers.
LARGEST_DIM = 512
MOST_SPLITS = 32
# Bytes of state that splits may add up to: written and read for every tile, which has 16 MB itself.
MOST_STATE = 16 << 20
# What a tile has, about, of one layer's keys and values; see ``scheduler.plan``.
TILE_BYTES = 16 << 20
# What a block does before and after its keys (its queries, its state), in steps of keys.
OVERHEAD = 1.0


class Tiling(NamedTuple):
    """How the work is cut.

    Attributes:
        rows, keys: per block and step. wide, parts: the head dimension is taken in ``parts`` of ``wide``.
        warps, stages: Triton's two knobs. resident: blocks that a multiprocessor has room for at once.
    """

    rows: int
    keys: int
    wide: int
    parts: int
    warps: int
    stages: int
    resident: int


@cache
def tiling(rows: int, dim: int, itemsize: int, plain: bool = True) -> Tiling:
    """Tile sizes for R packed rows of D elements of ``itemsize`` bytes.

    ``plain``: whole steps of keys that all queries see; masks take registers of their own.
    """
    whole = max(16, _power(dim))
    if itemsize == 4:  # no tensor cores: what a product takes in registers keeps tiles small
        block = 16 if whole > 256 else min(32, max(16, _power(rows)))
        return Tiling(block, 16, whole, 1, warps=block // 4, stages=1 if whole > 256 else 2, resident=1)
    if whole > 256:
        return Tiling(min(32, max(16, _power(rows))), 32, whole, 1, warps=8, stages=1, resident=1)
    if rows <= 32:
        block = 16 if rows <= 16 else 32
        resident = 2 if whole <= 128 or block == 16 else 1
        return Tiling(block, 64 if whole <= 128 else 32, whole, 1, warps=4, stages=2, resident=resident)
    narrow = max(16, dim & -dim)  # the widest part that the head dimension is a multiple of
    if not plain:
        if whole <= 128:
            wide = min(narrow, 64)
            return Tiling(64, 16, wide, -(-dim // wide), warps=4, stages=2, resident=1)
        return Tiling(64, 16, whole, 1, warps=8, stages=2, resident=1)
    if whole <= 128:
        # An odd number of blocks of 64 rows: in blocks of 128, half of the last would be idle.
        block = 64 if -(-rows // 64) % 2 else 128
        wide = min(narrow, block)
        return Tiling(block, 64, wide, -(-dim // wide), warps=block // 16, stages=2, resident=128 // block)
    block, wide = 64 if rows <= 64 else 128, min(narrow, 128)
    resident = 2 if (block, wide) == (64, 64) else 1
    return Tiling(block, 32, wide, -(-dim // wide), warps=block // 16, stages=2, resident=resident)


@cache
def packed_tiling(rows: int, dim: int, itemsize: int) -> Tiling:
    """The same for packed chunks, whose head dimension D is a multiple of 16: they need no padding, and less memory."""
    narrow = min(128, dim & -dim)
    if itemsize == 4:
        if dim > 128:
            return Tiling(16, 16, narrow, dim // narrow, warps=8, stages=1, resident=1)
        block = min(32, max(16, _power(rows)))
        return Tiling(block, 32, narrow, dim // narrow, warps=block // 4, stages=1, resident=1)
    if dim > 256:
        block, keys = (16, 32) if rows <= 16 else (32, 16)
        return Tiling(block, keys, narrow, dim // narrow, warps=8, stages=2, resident=1)
    if rows <= 32:
        return Tiling(16 if rows <= 16 else 32, 64, narrow, dim // narrow, warps=4, stages=2, resident=1)
    block = 64 if rows <= 64 or narrow == 16 else 128
    wide = min(narrow, block)
    return Tiling(block, 64 if dim <= 128 else 32, wide, dim // wide, warps=block // 16, stages=2, resident=1)


def _power(number: int) -> int:
    """The next power of two."""
    return 1 << (max(1, number) - 1).bit_length()


@cache
def split_count(heads: int, rows: int, dim: int, itemsize: int, device: torch.device) -> int:
    """Splits of a tile's keys for K KV heads and R packed rows of D elements: those that fill whole waves best."""
    if device.type != "cuda":
        return 2
    return best_splits(heads, rows, dim, itemsize, torch.cuda.get_device_properties(device).multi_processor_count)


def best_splits(heads: int, rows: int, dim: int, itemsize: int, multiprocessors: int) -> int:
    """The same for a device with so many multiprocessors. Of equals, the fewest splits."""
    cut = tiling(rows, dim, itemsize)
    blocks, room = heads * -(-rows // cut.rows), multiprocessors * cut.resident
    steps = max(1, TILE_BYTES // (2 * heads * dim * itemsize * cut.keys))
    most = max(1, min(MOST_SPLITS, steps, MOST_STATE // (4 * heads * rows * dim)))
    return min(range(1, most + 1), key=lambda splits: wave_time(blocks, room, steps, splits))


def wave_time(blocks: int, room: int, steps: int, splits: int) -> float:
    """How long a tile takes, in steps of keys: that of one block times the number of waves."""
    return -(-blocks * splits // room) * (-(-steps // splits) + OVERHEAD)
