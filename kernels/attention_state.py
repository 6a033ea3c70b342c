"""What attention over streaming keys has seen so far, and its end: ``reference.PartialAttention`` in Triton.

The keys of each tile are shared out among S *splits*, as flash decoding does: a handful of queries makes too few
blocks to fill a GPU otherwise. Split s takes the s-th part of every tile and carries its own running softmax from
tile to tile, so splits meet only once, at the end, and always in the same order: no atomics, the same bits each time.
Scores are kept in units of log 2, which spares a product per exponential.
"""

# ruff: noqa: ANN001, ANN202 (the parameters of kernels are typed by Triton, at launch)

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload_triforce.kernels.launch import Launch, run
from offload_triforce.kernels.tiling import split_count

LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite, so that no difference of maxima is a NaN
LN_2 = tl.constexpr(math.log(2))


class SplitAttention(NamedTuple):
    """Softmax attention over the keys seen so far, per split: ``reference.PartialAttention`` with S in front.

    ``maximum`` (in units of log 2) and ``total`` are [S, K, R], ``weighted`` is [S, K, R, D]. Until it is ``started``
    they hold garbage, which the first update overwrites: that saves a launch to clear them.
    """

    maximum: Tensor
    total: Tensor
    weighted: Tensor
    started: bool


@cache
def state_layout(heads: int, rows: int, dim: int, itemsize: int, device: torch.device) -> tuple[int, int]:
    """The splits S, and S*K*R rounded up, so that every part of the buffer begins where a vector load may."""
    splits = split_count(heads, rows, dim, itemsize, device)
    return splits, (splits * heads * rows + 31) // 32 * 32


def state_buffers(buffers: tuple[Tensor, ...], packed: Tensor) -> tuple[Tensor, ...]:
    """Room for the state of queries [K, R, D]: the given buffers if they suffice, else new ones.

    One flat buffer serves every shape that fits, so that a pass allocates nothing after its largest block.
    """
    heads, rows, dim = packed.shape
    device = packed.device
    needed = state_layout(heads, rows, dim, packed.element_size(), device)[1] * (dim + 2)
    if buffers and buffers[0].numel() >= needed and buffers[0].device == device:
        return buffers
    return (torch.empty(needed, dtype=torch.float32, device=device),)


def attention_start(buffers: tuple[Tensor, ...], packed: Tensor) -> SplitAttention:
    """The state before any key, in ``state_buffers``."""
    if packed.stride(2) != 1:
        raise ValueError(f"the elements of a query must be neighbours in memory, not {packed.stride(2)} apart")
    heads, rows, dim = packed.shape
    splits, padded = state_layout(heads, rows, dim, packed.element_size(), packed.device)
    (buffer,), across = buffers, heads * rows
    shape, strides = (splits, heads, rows), (across, rows, 1)
    return SplitAttention(
        buffer.as_strided(shape, strides, padded * dim),
        buffer.as_strided(shape, strides, padded * (dim + 1)),
        buffer.as_strided((*shape, dim), (across * dim, rows * dim, dim, 1), 0),
        started=False,
    )


def attention_logsumexp(state: SplitAttention) -> Tensor:
    """Log-sum-exp of the scores so far, per query: float32 [K, R]. The state goes on afterwards."""
    output = torch.empty(state.maximum.shape[1:], dtype=torch.float32, device=state.maximum.device)
    if not state.started:
        return output.fill_(float("-inf"))
    run(combine_launch(state, output, logarithm=True))
    return output


def attention_finish(state: SplitAttention, heads: int, dtype: torch.dtype, sinks: Tensor | None = None) -> Tensor:
    """Join the splits, normalise and unpack: [H, T, D] in ``dtype``. Queries that saw no key get zeros.

    ``sinks`` [H] (see ``AttentionParams``) join the softmax here, once for all splits.
    """
    _, kv_heads, rows, dim = state.weighted.shape
    output = torch.empty(heads, kv_heads * rows // heads, dim, dtype=dtype, device=state.weighted.device)
    if not state.started:
        return output.zero_()
    run(combine_launch(state, output, logarithm=False, sinks=sinks))
    return output


def combine_launch(state: SplitAttention, output: Tensor, logarithm: bool, sinks: Tensor | None = None) -> Launch:
    """What the splits are joined with: a program per block of rows and KV head."""
    if sinks is not None and sinks.stride(0) != 1:
        raise ValueError("the sinks of neighbouring heads must be neighbours in memory")
    splits, heads, rows, dim = state.weighted.shape
    padded, most = triton.next_power_of_2(dim), triton.next_power_of_2(splits)
    block = min(16, max(1, 4096 // (most * padded)))
    tokens = rows if sinks is None else heads * rows // sinks.shape[0]  # rows of one query head
    arguments = (*state[:3], output, sinks, rows, splits, tokens, logarithm, dim, padded, block, most)
    return Launch(_combine_kernel, (-(-rows // block), heads, 1), arguments, {"num_warps": 4})


@triton.jit(do_not_specialize=["rows", "splits", "tokens"])
def _combine_kernel(
    maximum, total, weighted, output, sinks, rows, splits, tokens,
    LOGARITHM: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """A block of rows of one KV head: all their splits, on the scale of the largest score among them."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    place = tl.program_id(1).to(tl.int64) * rows + row
    split = tl.arange(0, MOST).to(tl.int64)
    at = split[:, None] * tl.num_programs(1) * rows + place[None, :]
    exists = (split < splits)[:, None] & (row < rows)[None, :]
    maxima = tl.load(maximum + at, mask=exists, other=LOWEST)
    highest = tl.max(maxima, 0)
    if sinks is not None:  # place // tokens is the query head
        sink = tl.load(sinks + place // tokens, mask=row < rows, other=0.0).to(tl.float32) / LN_2
        highest = tl.maximum(highest, sink)
    decay = tl.exp2(maxima - highest[None, :])
    mass = tl.sum(tl.load(total + at, mask=exists, other=0.0) * decay, 0)
    if sinks is not None:
        mass += tl.exp2(sink - highest)
    if LOGARITHM:
        tl.store(output + place, (highest + tl.log2(mass)) * LN_2, mask=row < rows)
    else:
        dims = tl.arange(0, BLOCK_DIM)
        in_dim = dims < DIM
        cells = at[:, :, None] * DIM + dims[None, None, :]
        sums = tl.load(weighted + cells, mask=exists[:, :, None] & in_dim[None, None, :], other=0.0)
        mean = tl.sum(sums * decay[:, :, None], 0) / tl.where(mass == 0, 1.0, mass)[:, None]
        tl.store(output + place[:, None] * DIM + dims[None, :], mean, mask=(row < rows)[:, None] & in_dim[None, :])
