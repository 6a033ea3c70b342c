"""How much the queries want each chunk of a tile, in Triton: the twin of ``reference.chunk_scores``.

A launch of its own, though attention computes the same products: a mean of scores is the score of a mean. Within
the attention kernel it would spare a sixteenth of the products and one launch. But adding up over rows, which lie in
other threads, more than doubled the instructions per step (526 to 1218 of 64 keys, compiled for 8.9), spilled
registers, put ten barriers where there are two, and took only chunks that divide a step.
"""

# ruff: noqa: ANN001, ANN202 (the parameters of kernels are typed by Triton, at launch)

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload_triforce.kernels.attention_state import LN_2
from offload_triforce.kernels.launch import Launch, check_rows, run
from offload_triforce.kernels.verify_attention import _dot, interpreted

LARGEST = tl.constexpr(3.4028234663852886e38)
LOG2_E = tl.constexpr(math.log2(math.e))


def chunk_scores(
    packed: Tensor, key: Tensor, chunk: int, scaling: float, baseline: Tensor, held: Tensor | None = None
) -> Tensor:
    """How much the queries of the block want each chunk of ``key`` [K, C*chunk, D]: float32 [K, C]."""
    check_rows(packed, key)
    heads, tokens, _ = key.shape
    output = torch.empty(heads, tokens // chunk, dtype=torch.float32, device=key.device)
    run(score_launch(packed, key, chunk, scaling, baseline, held, output, 0))
    return output


def score_launch(
    packed: Tensor,
    key: Tensor,
    chunk: int,
    scaling: float,
    baseline: Tensor,
    held: Tensor | None,
    output: Tensor,
    first: int,
) -> Launch:
    """What ``chunk_scores`` launches: a program per KV head and block of chunks.

    ``held`` may be a longer table: the columns from ``first`` on are those of the key's chunks.
    """
    (heads, rows, dim), chunks = packed.shape, output.shape[1]
    padded = max(16, triton.next_power_of_2(dim))
    if key.element_size() == 4:  # no tensor cores: what a product takes in registers keeps blocks small
        block, block_rows, warps = 16, 16, 8
    else:
        block, warps = 32, 4
        block_rows = min(64, 8192 // padded, max(16, triton.next_power_of_2(rows)))
    step = max(1, min(triton.next_power_of_2(chunk), 256 // padded))  # tokens of a chunk at a time
    held_strides = (0, 0) if held is None else held.stride()
    arguments = (
        packed, key, baseline, held, output, scaling * LOG2_E.value, rows, chunks, first,
        packed.stride(0), packed.stride(1), key.stride(0), key.stride(1),
        *baseline.stride(), *held_strides, chunk, dim, padded, step, block, block_rows, interpreted(),
    )  # fmt: skip
    return Launch(_score_kernel, (-(-chunks // block), heads, 1), arguments, {"num_warps": warps, "num_stages": 2})


@triton.jit
def _mean_keys(
    start, key_column, exists, CHUNK: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Means of BLOCK chunks that begin at ``start``: float32 [BLOCK, BLOCK_DIM]."""
    dims = tl.arange(0, BLOCK_DIM)[None, None, :]
    sums = tl.zeros([BLOCK, BLOCK_DIM], tl.float32)
    for begin in tl.static_range(0, CHUNK, STEP):
        token = begin + tl.arange(0, STEP)[None, :, None]
        there = exists[:, None, None] & (token < CHUNK) & (dims < DIM)
        k = tl.load(start[:, None, None] + token.to(tl.int64) * key_column + dims, mask=there, other=0.0)
        sums += tl.sum(k.to(tl.float32), 1)
    return sums / CHUNK


@triton.jit(
    do_not_specialize=["rows", "chunks", "first", "baseline_head", "baseline_row", "held_head", "held_column"],
    do_not_specialize_on_alignment=["baseline", "held"],
)
def _score_kernel(
    query, key, baseline, held, output, scale, rows, chunks, first,
    query_head, query_row, key_head, key_column, baseline_head, baseline_row, held_head, held_column,
    CHUNK: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, STEP: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Mean keys of a block of chunks, then log-sum-exp of their wishes over all rows.

    Each place of a block of rows keeps a running maximum and mass of its own: no thread waits for another in the loop.
    """
    head = tl.program_id(1).to(tl.int64)
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = number < chunks
    dims = tl.arange(0, BLOCK_DIM)[None, :]
    starts = key + head * key_head + number.to(tl.int64) * CHUNK * key_column
    means = _mean_keys(starts, key_column, exists, CHUNK, DIM, BLOCK_DIM, STEP, BLOCK).to(key.dtype.element_ty)
    query += head * query_head
    baseline += head * baseline_head

    highest = tl.full([BLOCK, BLOCK_ROWS], -LARGEST, tl.float32)
    mass = tl.zeros([BLOCK, BLOCK_ROWS], tl.float32)
    for begin in range(0, rows, BLOCK_ROWS):
        row = begin + tl.arange(0, BLOCK_ROWS)
        wide = row.to(tl.int64)
        there = (row < rows)[:, None] & (dims < DIM)
        q = tl.load(query + wide[:, None] * query_row + dims, mask=there, other=0.0)
        base = tl.load(baseline + wide * baseline_row, mask=row < rows, other=float("inf")) * LOG2_E
        wishes = _dot(means, tl.trans(q), tl.zeros([BLOCK, BLOCK_ROWS], tl.float32), WIDEN) * scale - base[None, :]
        # Kept finite, for a baseline may be infinite and the difference of two infinities is a NaN.
        higher = tl.minimum(tl.maximum(highest, wishes), LARGEST)
        mass = mass * tl.exp2(highest - higher) + tl.exp2(wishes - higher)
        highest = higher
    top = tl.max(highest, 1)
    scores = (top + tl.log2(tl.sum(mass * tl.exp2(highest - top[:, None]), 1))) * LN_2
    if held is not None:
        place = (first + number).to(tl.int64)
        taken = tl.load(held + head * held_head + place * held_column, mask=exists, other=1) != 0
        scores = tl.where(taken, float("-inf"), scores)
    tl.store(output + head * chunks + number, scores, mask=exists)
