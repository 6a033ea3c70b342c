"""From how many tokens on a product with 4-bit weights writes them out in 16 bits first.

bitsandbytes has a kernel that reads 4-bit weights as they are, and beside it the old way: write them out, and let
cuBLAS read them again. Which one it takes depends on the card, on the shape of the weights and on the number of tokens.
This is its rule, as release 0.50.2 has it (``backends/cuda/ops.py``: ``_gemm_4bit_use_custom_cuda`` and what is
registered as ``bitsandbytes::gemm_4bit``), for the cards that the planner knows; tests hold it against the release that
is installed. Its limits come from its authors' measurements. They speak of *waves*: blocks of 64 rows per
multiprocessor of the card.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from offload_triforce.model.counts import NF4_BLOCK, Matrix

# Up to so many tokens weights are never written out, and beyond so many always.
FEW, MANY = 4, 1536
# float32 has no matrix instructions for it: so many tokens less one.
FEW_FLOAT32 = 8
# Weights of fewer numbers have limits of their own; larger ones are always written out beyond so many tokens.
SMALL, MANY_OF_LARGE = 4 << 20, 512


def unpacked_numbers(matrices: Sequence[Matrix], tokens: int, itemsize: int, cc: int, sms: int) -> int:
    """How many of these weights a step of so many tokens writes out.

    Args:
        itemsize: bytes of a number that a step computes with. cc: compute capability, 89 for 8.9. sms: multiprocessors.
    """
    return sum(
        rows * columns * number
        for rows, columns, number in matrices
        if not is_fused(tokens, rows, columns, itemsize, cc, sms)
    )


@functools.lru_cache(maxsize=4096)
def is_fused(tokens: int, rows: int, columns: int, itemsize: int, cc: int, sms: int) -> bool:
    """Whether weights [rows, columns] are read as they are in a product with so many tokens.

    Arguments as of ``unpacked_numbers``. Cards that are none of 8.0, 8.6, 8.9, 9.0 and 12.0 are taken for 8.9.
    """
    if columns % NF4_BLOCK or tokens > MANY:
        return False
    if tokens <= FEW:
        return True
    if itemsize == 4:
        return tokens < FEW_FLOAT32
    blocks = -(-rows // 64)
    if rows * columns < SMALL:
        return tokens <= _most_of_small(rows, columns, blocks, cc, sms)
    if tokens < 8:
        return not (cc in (80, 90) and tokens >= 6 and _is_deep(rows, columns, blocks, cc, sms))
    return tokens <= min(MANY_OF_LARGE, _most_of_large(rows, columns, blocks, cc, sms))


def _is_deep(rows: int, columns: int, blocks: int, cc: int, sms: int) -> bool:
    """Cards with stacked memory (A100, H100) write some square and narrow weights out from 6 tokens on."""
    waves = blocks / sms
    if blocks < (36 if cc == 90 else 48) or rows > columns:
        return False
    if columns > rows:
        return waves < 0.75
    return waves < 0.6 if cc == 80 else 0.6 <= waves < 0.75


def _most_of_small(rows: int, columns: int, blocks: int, cc: int, sms: int) -> int:
    """Most tokens for weights of less than SMALL numbers; 0 where FEW is all."""
    waves = blocks / sms
    if 2 * columns < rows:
        if cc == 80:
            return 1536 if waves < 1 / 3 else 512
        if cc == 90:
            return 512 if waves < 1 / 3 else 320
        return 192 if waves < 1 and blocks * columns > 320 * sms else 320
    if waves <= 0.25:
        if cc == 80:
            return 384 if columns < rows else 32 if waves <= 0.125 else 128
        return 32 if columns < rows or cc == 90 else 23
    return 16 if waves <= 0.5 else 0


def _most_of_large(rows: int, columns: int, blocks: int, cc: int, sms: int) -> int:
    """Most tokens, of 8 and more, for larger weights; 0 where there are none."""
    waves, half = blocks / sms, blocks >= sms // 2
    if cc == 80:
        return _most_on_a100(rows, columns, blocks, sms)
    if cc == 86:
        return 128 if waves >= 1 else 64 if half else 16
    if cc == 90:
        if waves >= 1:
            return 64 if waves >= 3 else 48 if waves >= 2 else 32
        return 16 if half and not (columns >= rows and waves < 0.75) else 0
    if waves >= 2:
        return 256 if waves >= 3 else 128
    deep = columns > 2 * rows
    if cc == 120:
        if waves >= 0.8:
            return 96 if columns >= rows else 64
        if half:
            return 64 if 2 * columns >= rows and blocks >= 128 else 8
        return 16 if deep and blocks > 64 else 8
    if waves >= 0.8:
        if deep or blocks >= 200:
            return 128
        return (128 if sms >= 60 else 32) if columns >= rows else 64
    if half:
        return 64 if deep else 8 if blocks >= 64 else 32
    if columns > rows and blocks <= 48:
        return 12 if columns >= 3 * rows else 10
    return 16 if deep or blocks < 48 else 8


def _most_on_a100(rows: int, columns: int, blocks: int, sms: int) -> int:
    waves = blocks / sms
    if waves >= 1:
        return 128 if waves >= 3 else 64 if columns < rows else 32
    if columns >= 3 * rows and waves > 0.25:
        return 0
    if columns == rows and blocks >= 48 and waves < 0.6:
        return 0
    if waves < 0.5:
        if columns <= rows:
            return 128
        if waves >= 1 / 3:
            return 0
    return 128 if blocks >= sms // 2 and columns < rows else 16
