"""Attention of a block of queries over keys that stream by, in Triton: the twin of ``reference.attention_*``.

The keys of each tile are shared out among S *splits*, as flash decoding does: a handful of queries makes too few
blocks to fill a GPU otherwise. Split s takes the s-th part of every tile and carries its own running softmax from
tile to tile, so splits meet only once, at the end, and always in the same order: no atomics, the same bits each time.

Only what all of Ampere, Ada, Hopper and Blackwell have is used, and no block takes more than the 99 KB of shared memory
that RTX cards give it. Offsets are int64 throughout: indices are widened before a stride multiplies them.
"""

# ruff: noqa: ANN001, ANN202 (the parameters of kernels are typed by Triton, at launch)

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload_triforce.kernels.types import AttentionParams, TreeMask

LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite, so that no difference of maxima is a NaN

MOST_SPLITS = 32
MOST_STATE = 4 << 20  # bytes


class SplitAttention(NamedTuple):
    """Softmax attention over the keys seen so far, per split: ``reference.PartialAttention`` with S in front.

    ``maximum`` and ``total`` are [S, K, R], ``weighted`` is [S, K, R, D]. Until it is ``started`` they
    hold garbage, which the first update overwrites: that saves a launch to clear them.
    """

    maximum: Tensor
    total: Tensor
    weighted: Tensor
    started: bool


class Tiling(NamedTuple):
    """How the work is cut: rows and keys per step, the head dimension as a power of two, and Triton's two knobs."""

    rows: int
    keys: int
    dim: int
    warps: int
    stages: int


@cache
def tiling(rows: int, dim: int, itemsize: int) -> Tiling:
    """Tile sizes for R packed rows of D elements of ``itemsize`` bytes, found by compiling.

    Most leave room for two blocks in the 100 KB of shared memory of an RTX card's multiprocessor, and only masks make
    some spill a little. Float32 has no tensor cores to use, and what a dot takes in registers keeps tiles small.
    """
    block = min(64 if itemsize == 2 else 32, max(16, triton.next_power_of_2(rows)))
    padded = max(16, triton.next_power_of_2(dim))
    if itemsize == 4:
        return Tiling(block, 16, padded, warps=block // 4, stages=2)
    keys = 64 if block * padded <= 32 * 128 else 32 if block * padded <= 64 * 128 else 16
    keys = min(keys, 64 * 128 // padded)
    return Tiling(block, keys, padded, warps=8 if block * padded > 64 * 128 else 4, stages=2)


@cache
def split_count(blocks: int, size: int, device: torch.device) -> int:
    """A power of two: splits that make about two blocks per multiprocessor of ``blocks``, with ``size`` bytes of state.

    The state is read and written for each tile, which must cost little beside the tile itself.
    """
    if device.type != "cuda":
        return 2
    wanted = 2 * torch.cuda.get_device_properties(device).multi_processor_count // blocks
    return 1 << (max(1, min(MOST_SPLITS, wanted, MOST_STATE // size)).bit_length() - 1)


@cache
def state_layout(heads: int, rows: int, dim: int, itemsize: int, device: torch.device) -> tuple[int, int]:
    """The splits S, and S*K*R rounded up, so that every part of the buffer begins where a vector load may."""
    blocks = heads * -(-rows // tiling(rows, dim, itemsize).rows)
    splits = split_count(blocks, 4 * heads * rows * dim, device)
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


def attention_update(
    state: SplitAttention,
    packed: Tensor,
    key: Tensor,
    value: Tensor,
    params: AttentionParams,
    tree_mask: TreeMask | None = None,
) -> SplitAttention:
    """Take the keys and values of one tile in, [K, n, D] each, in place. Only D has to be contiguous."""
    if key.stride(2) != 1 or value.stride(2) != 1:
        raise ValueError("the elements of a key, and of a value, must be neighbours in memory")
    grid, arguments, options = update_arguments(state, packed, key, value, params, tree_mask)
    _update_kernel[grid](*arguments, **options)
    return state if state.started else state._replace(started=True)


def _interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels. Its dot takes the bits of a bfloat16 for an integer."""
    return not isinstance(_update_kernel, triton.JITFunction)


def update_arguments(
    state: SplitAttention,
    packed: Tensor,
    key: Tensor,
    value: Tensor,
    params: AttentionParams,
    tree_mask: TreeMask | None,
) -> tuple[tuple[int, int, int], tuple[Any, ...], dict[str, Any]]:
    """Grid, arguments and options that ``attention_update`` launches its kernel with."""
    heads, rows, dim = packed.shape
    scaling, window, softcap = params
    if softcap is not None:
        scaling = scaling / softcap
    if tree_mask is None:
        window = mask = positions = length = None
        tokens = masked = mask_row = mask_column = 0
    else:
        mask, positions, length = tree_mask
        (tokens, masked), (mask_row, mask_column) = mask.shape, mask.stride()
        if window is None:
            positions = None
    cut = tiling(rows, dim, key.element_size())
    arguments = (
        packed, key, value, mask, positions, length, *state[:3],
        scaling, softcap, window, rows, key.shape[1], tokens, masked,
        packed.stride(0), packed.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        mask_row, mask_column, not state.started, dim, cut.dim, cut.rows, cut.keys,
        _interpreted(),
    )  # fmt: skip
    grid = (-(-rows // cut.rows), heads, state.maximum.shape[0])
    return grid, arguments, {"num_warps": cut.warps, "num_stages": cut.stages}


def attention_logsumexp(state: SplitAttention) -> Tensor:
    """Log-sum-exp of the scores so far, per query: float32 [K, R]. The state goes on afterwards."""
    output = torch.empty(state.maximum.shape[1:], dtype=torch.float32, device=state.maximum.device)
    if not state.started:
        return output.fill_(float("-inf"))
    return _combine(state, output, logarithm=True)


def attention_finish(state: SplitAttention, heads: int, dtype: torch.dtype) -> Tensor:
    """Join the splits, normalise and unpack: [H, T, D] in ``dtype``. Queries that saw no key get zeros."""
    _, kv_heads, rows, dim = state.weighted.shape
    output = torch.empty(heads, kv_heads * rows // heads, dim, dtype=dtype, device=state.weighted.device)
    if not state.started:
        return output.zero_()
    return _combine(state, output, logarithm=False)


def _combine(state: SplitAttention, output: Tensor, logarithm: bool) -> Tensor:
    grid, arguments, options = combine_arguments(state, output, logarithm)
    _combine_kernel[grid](*arguments, **options)
    return output


def combine_arguments(
    state: SplitAttention, output: Tensor, logarithm: bool
) -> tuple[tuple[int, int], tuple[Any, ...], dict[str, Any]]:
    """Grid, arguments and options that the splits are joined with."""
    splits, heads, rows, dim = state.weighted.shape
    padded = triton.next_power_of_2(dim)
    block = min(16, max(1, 4096 // (splits * padded)))
    arguments = (*state[:3], output, rows, logarithm, dim, padded, block, splits)
    return (-(-rows // block), heads), arguments, {"num_warps": 4}


@triton.jit
def _tanh(x):
    """tanh to float32 accuracy: 1 - 2 / (exp(2x) + 1) cancels near zero, where a series serves instead."""
    size = tl.abs(x)
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    far = 1 - 2 / (tl.exp(2 * size) + 1)
    return tl.where(size < 0.25, series, tl.where(x < 0, -far, far))


@triton.jit
def _dot(a, b, accumulator, WIDEN: tl.constexpr):
    """a @ b on top of what is accumulated, in float32."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def _visible(
    scores, column, place, token, end, mask, window, masked, mask_row, mask_column
):  # fmt: skip
    """Scores with -inf for the keys that a query does not see: ``reference.visible_keys``."""
    in_mask = column - end + masked
    offsets = token.to(tl.int64)[:, None] * mask_row + in_mask.to(tl.int64)[None, :] * mask_column
    inside = ((in_mask >= 0) & (in_mask < masked))[None, :]
    seen = (tl.load(mask + offsets, mask=inside, other=0) != 0) | (in_mask < 0)[None, :]
    if window is not None:
        seen = seen & (column[None, :] > (place - window)[:, None])
    return tl.where(seen, scores, float("-inf"))


@triton.jit(
    do_not_specialize=["window", "rows", "keys", "tokens", "masked", "mask_row", "mask_column"]
)  # one binary for every count: these change from step to step
def _update_kernel(
    query, key, value, mask, positions, length, maximum, total, weighted,
    scaling, softcap, window, rows, keys, tokens, masked,
    query_head, query_row, key_head, key_column, value_head, value_column, mask_row, mask_column,
    FIRST: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """One block of rows, one KV head, one split: its part of the tile into its running softmax."""
    head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    dims = tl.arange(0, BLOCK_DIM)
    row_exists = row < rows
    here = row_exists[:, None] & (dims < DIM)[None, :]

    end = keys
    if length is not None:
        end = tl.load(length).to(tl.int32)
    stop = tl.minimum(end, keys)
    first = stop * 0
    token = row
    place = row
    if mask is not None:
        token = row % tokens
        place = end - tokens + token
        if window is not None:
            if positions is not None:
                place = tl.load(positions + token).to(tl.int32)
            first = tl.maximum(tl.min(place) - window + 1, 0)  # no query of the block sees further back

    steps = tl.cdiv(tl.maximum(stop - first, 0), BLOCK_KEYS)
    part = tl.cdiv(steps, tl.num_programs(2)) * BLOCK_KEYS
    start = first + split * part
    stop = tl.minimum(start + part, stop)
    if not FIRST:  # noqa: SIM102 (one is known when the kernel is built, the other is not)
        if start >= stop:
            return

    at = (split.to(tl.int64) * tl.num_programs(1) + head) * rows + row
    cells = at[:, None] * DIM + dims[None, :]
    if FIRST:
        highest = tl.full([BLOCK_ROWS], LOWEST, tl.float32)
        mass = tl.zeros([BLOCK_ROWS], tl.float32)
        sums = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    else:
        highest = tl.load(maximum + at, mask=row_exists, other=LOWEST)
        mass = tl.load(total + at, mask=row_exists, other=0.0)
        sums = tl.load(weighted + cells, mask=here, other=0.0)

    queries = tl.load(
        query + head * query_head + row.to(tl.int64)[:, None] * query_row + dims[None, :], mask=here, other=0.0
    )
    for begin in range(start, stop, BLOCK_KEYS):
        column = begin + tl.arange(0, BLOCK_KEYS)
        wide = column.to(tl.int64)[:, None]
        there = (column < stop)[:, None] & (dims < DIM)[None, :]
        k = tl.load(key + head * key_head + wide * key_column + dims[None, :], mask=there, other=0.0)
        v = tl.load(value + head * value_head + wide * value_column + dims[None, :], mask=there, other=0.0)
        scores = _dot(queries, tl.trans(k), tl.zeros([BLOCK_ROWS, BLOCK_KEYS], tl.float32), WIDEN) * scaling
        if softcap is not None:
            scores = _tanh(scores) * softcap
        scores = tl.where((column < stop)[None, :], scores, float("-inf"))
        if mask is not None:
            scores = _visible(scores, column, place, token, end, mask, window, masked, mask_row, mask_column)
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        decay = tl.exp(highest - higher)
        mass = mass * decay + tl.sum(weights, 1)
        sums = _dot(weights.to(v.dtype), v, sums * decay[:, None], WIDEN)
        highest = higher

    tl.store(maximum + at, highest, mask=row_exists)
    tl.store(total + at, mass, mask=row_exists)
    tl.store(weighted + cells, sums, mask=here)


@triton.jit(do_not_specialize=["rows"])
def _combine_kernel(
    maximum, total, weighted, output, rows,
    LOGARITHM: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """A block of rows of one KV head: all their splits, on the scale of the largest score among them."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exists = row < rows
    place = tl.program_id(1).to(tl.int64) * rows + row
    split = tl.arange(0, SPLITS).to(tl.int64)
    at = split[:, None] * tl.num_programs(1) * rows + place[None, :]
    maxima = tl.load(maximum + at, mask=exists[None, :], other=0.0)
    highest = tl.max(maxima, 0)
    decay = tl.exp(maxima - highest[None, :])
    mass = tl.sum(tl.load(total + at, mask=exists[None, :], other=1.0) * decay, 0)
    if LOGARITHM:
        tl.store(output + place, highest + tl.log(mass), mask=exists)
    else:
        dims = tl.arange(0, BLOCK_DIM)
        here = exists[:, None] & (dims < DIM)[None, :]
        cells = at[:, :, None] * DIM + dims[None, None, :]
        sums = tl.sum(tl.load(weighted + cells, mask=here[None, :, :], other=0.0) * decay[:, :, None], 0)
        mean = sums / tl.where(mass == 0, 1.0, mass)[:, None]
        tl.store(output + place[:, None] * DIM + dims[None, :], mean, mask=here)
