"""Packed chunks in Triton: the twins of ``reference_codec``, and attention straight from the codes.

A step of the retrieval level reads the codes once and unpacks them in registers, so that three times the tokens take
the time of one. Both halves of the head dimension are worked on side by side: a byte has a code of each.
"""

# ruff: noqa: ANN001, ANN202 (the parameters of kernels are typed by Triton, at launch)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload_triforce.kernels.reference_codec import LEAST_STEP
from offload_triforce.kernels.types import AttentionParams, CodedChunks
from offload_triforce.kernels.verify_attention import LOWEST, SplitAttention, _dot, _interpreted, _tanh, tiling

Launch = tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]

SMALLEST = tl.constexpr(LEAST_STEP)


def encode_chunks(source: Tensor, kv: Tensor, coded: CodedChunks) -> None:
    """Pack the chunks that enter out of a tile: ``kv`` [2, K, C*chunk, D] into the slots of ``coded``."""
    grid, arguments, options = encode_arguments(source, kv, coded)
    _encode_kernel[grid](*arguments, **options)


def encode_arguments(source: Tensor, kv: Tensor, coded: CodedChunks) -> Launch:
    """What ``encode_chunks`` launches: one program per slot and KV head."""
    if kv.stride(3) != 1:
        raise ValueError("the elements of a key, and of a value, must be neighbours in memory")
    heads, slots = source.shape
    half = kv.shape[3] // 2
    arguments = (
        source, kv, *coded, source.stride(0), *kv.stride()[:3], *strides(coded),
        coded.chunk, triton.next_power_of_2(coded.chunk), half, triton.next_power_of_2(half), coded.bits,
    )  # fmt: skip
    return (slots, heads), arguments, {"num_warps": 2}


def strides(coded: CodedChunks) -> tuple[int, int, int]:
    """From head to head, of codes, of the keys' ranges and of the values' ranges. Within a head all is contiguous."""
    return coded.key_codes.stride(0), coded.key_low.stride(0), coded.value_low.stride(0)


def decode_keys(coded: CodedChunks, slots: int, dtype: torch.dtype) -> Tensor:
    """Keys of the first ``slots`` slots, [K, slots * chunk, D] in ``dtype``."""
    heads, dim = coded.floor.shape
    output = torch.empty(heads, slots * coded.chunk, dim, dtype=dtype, device=coded.floor.device)
    grid, arguments, options = decode_arguments(coded, slots, output)
    _decode_kernel[grid](*arguments, **options)
    return output


def decode_arguments(coded: CodedChunks, slots: int, output: Tensor) -> Launch:
    """What ``decode_keys`` launches: one program per slot and KV head."""
    half = output.shape[2] // 2
    arguments = (
        coded.key_codes, coded.key_low, coded.key_step, coded.floor, coded.spread, output,
        *strides(coded)[:2], output.stride(0),
        coded.chunk, triton.next_power_of_2(coded.chunk), half, triton.next_power_of_2(half), coded.bits,
    )  # fmt: skip
    return (slots, output.shape[0]), arguments, {"num_warps": 2}


def attention_update(
    state: SplitAttention,
    packed: Tensor,
    coded: CodedChunks,
    params: AttentionParams,
    slots: int | None = None,
    tokens: Tensor | None = None,
) -> SplitAttention:
    """Take packed chunks into an attention, in place: those of the first ``slots``, or the first ``tokens``.

    Every query sees them, whatever the window.
    """
    grid, arguments, options = update_arguments(state, packed, coded, params, slots, tokens)
    _update_kernel[grid](*arguments, **options)
    return state if state.started else state._replace(started=True)


def update_arguments(
    state: SplitAttention,
    packed: Tensor,
    coded: CodedChunks,
    params: AttentionParams,
    slots: int | None,
    tokens: Tensor | None,
) -> Launch:
    """What ``attention_update`` launches."""
    heads, rows, dim = packed.shape
    if dim % 2:
        raise ValueError(f"chunks are packed for even head dimensions, not {dim}")
    scaling = params.scaling if params.softcap is None else params.scaling / params.softcap
    keys = (coded.key_codes.shape[1] if slots is None else slots) * coded.chunk
    cut = tiling(rows, dim, packed.element_size())
    arguments = (
        packed, *coded, tokens, *state[:3], scaling, params.softcap, rows, keys, packed.stride(0), packed.stride(1),
        *strides(coded), not state.started, coded.chunk, dim // 2, max(16, triton.next_power_of_2(dim // 2)),
        cut.rows, min(cut.keys, 32), coded.bits, _interpreted(),
    )  # fmt: skip
    grid = (-(-rows // cut.rows), heads, state.maximum.shape[0])
    return grid, arguments, {"num_warps": cut.warps, "num_stages": 2}


@triton.jit
def _codes(base, token, dims, there, HALF: tl.constexpr, BITS: tl.constexpr):
    """The codes of some tokens, low and high half of the head dimension, as float32."""
    if BITS == 4:
        both = tl.load(base + token * HALF + dims, mask=there, other=0)
        low, high = both & 15, both >> 4
    else:
        low = tl.load(base + token * 2 * HALF + dims, mask=there, other=0)
        high = tl.load(base + token * 2 * HALF + HALF + dims, mask=there, other=0)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def _affine(codes, low, step, slot, dims, there, floor, unit, HALF: tl.constexpr, LEVELS: tl.constexpr):
    """Keys from their codes: ``floor`` and ``unit`` (spread / 255) are of one half; ``low``, ``step`` begin there."""
    at = slot * 2 * HALF + dims
    least = floor + unit * tl.load(low + at, mask=there, other=0).to(tl.float32)
    return least + unit / LEVELS * tl.load(step + at, mask=there, other=0).to(tl.float32) * codes


@triton.jit(do_not_specialize=["rows", "keys"])
def _update_kernel(
    query, key_codes, value_codes, key_low, key_step, value_low, value_step, floor, spread, length,
    maximum, total, weighted, scaling, softcap, rows, keys, query_head, query_row, codes_head, range_head, token_head,
    FIRST: tl.constexpr, CHUNK: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BITS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One block of rows, one KV head, one split: see ``verify_attention``."""
    LEVELS: tl.constexpr = 2**BITS - 1
    head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    dims = tl.arange(0, BLOCK_HALF)[None, :]
    in_half = dims < HALF
    row_exists = row < rows
    here = row_exists[:, None] & in_half

    stop = keys
    if length is not None:
        stop = tl.minimum(tl.load(length).to(tl.int32), keys)
    part = tl.cdiv(tl.cdiv(stop, BLOCK_KEYS), tl.num_programs(2)) * BLOCK_KEYS
    start = split * part
    stop = tl.minimum(start + part, stop)
    if not FIRST:  # noqa: SIM102 (one is known when the kernel is built, the other is not)
        if start >= stop:
            return

    at = (split.to(tl.int64) * tl.num_programs(1) + head) * rows + row
    cells = at[:, None] * (2 * HALF) + dims
    if FIRST:
        highest = tl.full([BLOCK_ROWS], LOWEST, tl.float32)
        mass = tl.zeros([BLOCK_ROWS], tl.float32)
        sums_low = tl.zeros([BLOCK_ROWS, BLOCK_HALF], tl.float32)
        sums_high = tl.zeros([BLOCK_ROWS, BLOCK_HALF], tl.float32)
    else:
        highest = tl.load(maximum + at, mask=row_exists, other=LOWEST)
        mass = tl.load(total + at, mask=row_exists, other=0.0)
        sums_low = tl.load(weighted + cells, mask=here, other=0.0)
        sums_high = tl.load(weighted + cells + HALF, mask=here, other=0.0)

    queries = query + head * query_head + row.to(tl.int64)[:, None] * query_row + dims
    query_low = tl.load(queries, mask=here, other=0.0)
    query_high = tl.load(queries + HALF, mask=here, other=0.0)
    fixed = head * 2 * HALF + dims
    floor_low = tl.load(floor + fixed, mask=in_half, other=0.0)
    floor_high = tl.load(floor + fixed + HALF, mask=in_half, other=0.0)
    unit_low = tl.load(spread + fixed, mask=in_half, other=0.0) / 255
    unit_high = tl.load(spread + fixed + HALF, mask=in_half, other=0.0) / 255
    key_codes += head * codes_head
    value_codes += head * codes_head
    key_low += head * range_head
    key_step += head * range_head
    value_low += head * token_head
    value_step += head * token_head
    for begin in range(start, stop, BLOCK_KEYS):
        column = begin + tl.arange(0, BLOCK_KEYS)
        exists = column < stop
        there = exists[:, None] & in_half
        token = column.to(tl.int64)[:, None]
        slot = token // CHUNK
        low, high = _codes(key_codes, token, dims, there, HALF, BITS)
        low = _affine(low, key_low, key_step, slot, dims, there, floor_low, unit_low, HALF, LEVELS)
        high = _affine(high, key_low + HALF, key_step + HALF, slot, dims, there, floor_high, unit_high, HALF, LEVELS)
        scores = tl.zeros([BLOCK_ROWS, BLOCK_KEYS], tl.float32)
        scores = _dot(query_low, tl.trans(low.to(query_low.dtype)), scores, WIDEN)
        scores = _dot(query_high, tl.trans(high.to(query_low.dtype)), scores, WIDEN) * scaling
        if softcap is not None:
            scores = _tanh(scores) * softcap
        scores = tl.where(exists[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        decay = tl.exp(highest - higher)
        mass = mass * decay + tl.sum(weights, 1)
        low, high = _codes(value_codes, token, dims, there, HALF, BITS)
        least = tl.load(value_low + column, mask=exists, other=0.0).to(tl.float32)[:, None]
        step = tl.load(value_step + column, mask=exists, other=0.0).to(tl.float32)[:, None]
        low = tl.where(there, least + step * low, 0.0).to(query_low.dtype)
        high = tl.where(there, least + step * high, 0.0).to(query_low.dtype)
        weights = weights.to(query_low.dtype)
        sums_low = _dot(weights, low, sums_low * decay[:, None], WIDEN)
        sums_high = _dot(weights, high, sums_high * decay[:, None], WIDEN)
        highest = higher

    tl.store(maximum + at, highest, mask=row_exists)
    tl.store(total + at, mass, mask=row_exists)
    tl.store(weighted + cells, sums_low, mask=here)
    tl.store(weighted + cells + HALF, sums_high, mask=here)


@triton.jit(do_not_specialize=["source_head"])
def _encode_kernel(
    source, kv, key_codes, value_codes, key_low, key_step, value_low, value_step, floor, spread,
    source_head, kv_part, kv_head, kv_token, codes_head, range_head, token_head,
    CHUNK: tl.constexpr, BLOCK_CHUNK: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """One chunk of keys and values into one slot, if one enters there."""
    LEVELS: tl.constexpr = 2**BITS - 1
    slot = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    chunk = tl.load(source + head * source_head + slot)
    if chunk < 0:
        return
    token = tl.arange(0, BLOCK_CHUNK).to(tl.int64)[:, None]
    dims = tl.arange(0, BLOCK_HALF)[None, :]
    there = (token < CHUNK) & (dims < HALF)
    taken = kv + head * kv_head + (chunk * CHUNK + token) * kv_token + dims
    codes = head * codes_head + (slot * CHUNK + token) * (HALF if BITS == 4 else 2 * HALF) + dims
    ranges = head * range_head + slot * 2 * HALF + dims

    low = _encode_keys(taken, floor, spread, key_low, key_step, ranges, head * 2 * HALF + dims, token, dims, 0,
                       CHUNK, HALF, LEVELS)  # fmt: skip
    high = _encode_keys(taken, floor, spread, key_low, key_step, ranges, head * 2 * HALF + dims, token, dims, HALF,
                        CHUNK, HALF, LEVELS)  # fmt: skip
    _store_codes(key_codes + codes, low, high, there, HALF, BITS)

    low = tl.load(taken + kv_part, mask=there, other=0.0).to(tl.float32)
    high = tl.load(taken + kv_part + HALF, mask=there, other=0.0).to(tl.float32)
    least = tl.min(tl.minimum(tl.where(there, low, float("inf")), tl.where(there, high, float("inf"))), 1)
    most = tl.max(tl.maximum(tl.where(there, low, float("-inf")), tl.where(there, high, float("-inf"))), 1)
    least = least.to(tl.float16)
    step = ((most - least.to(tl.float32)) / LEVELS).to(tl.float16)
    step = tl.maximum(step.to(tl.float32), SMALLEST).to(tl.float16)
    number = tl.arange(0, BLOCK_CHUNK).to(tl.int64)
    places = head * token_head + slot * CHUNK + number
    tl.store(value_low + places, least, mask=number < CHUNK)
    tl.store(value_step + places, step, mask=number < CHUNK)
    base, unit = least.to(tl.float32)[:, None], step.to(tl.float32)[:, None]
    low = tl.minimum(tl.maximum(tl.floor((low - base) / unit + 0.5), 0), LEVELS)
    high = tl.minimum(tl.maximum(tl.floor((high - base) / unit + 0.5), 0), LEVELS)
    _store_codes(value_codes + codes, low, high, there, HALF, BITS)


@triton.jit
def _encode_keys(
    taken, floor, spread, key_low, key_step, ranges, fixed, token, dims, OFFSET: tl.constexpr,
    CHUNK: tl.constexpr, HALF: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Codes of one half of a chunk's keys; stores their ranges."""
    in_half = dims < HALF
    there = (token < CHUNK) & in_half
    key = tl.load(taken + OFFSET, mask=there, other=0.0).to(tl.float32)
    base = tl.load(floor + fixed + OFFSET, mask=in_half, other=0.0)
    width = tl.load(spread + fixed + OFFSET, mask=in_half, other=1.0)
    least = tl.min(tl.where(there, key, float("inf")), 0)[None, :]
    most = tl.max(tl.where(there, key, float("-inf")), 0)[None, :]
    low = tl.minimum(tl.maximum(tl.floor((least - base) / width * 255), 0), 255)
    least = base + width * low / 255
    step = tl.minimum(tl.maximum(tl.ceil((most - least) / width * 255), 1), 255)
    tl.store(key_low + ranges + OFFSET, low.to(tl.uint8), mask=in_half)
    tl.store(key_step + ranges + OFFSET, step.to(tl.uint8), mask=in_half)
    codes = tl.floor((key - least) / (width / LEVELS * step / 255) + 0.5)
    return tl.minimum(tl.maximum(codes, 0), LEVELS)


@triton.jit
def _store_codes(codes, low, high, there, HALF: tl.constexpr, BITS: tl.constexpr):
    low, high = low.to(tl.uint8), high.to(tl.uint8)
    if BITS == 4:
        tl.store(codes, low | (high << 4), mask=there)
    else:
        tl.store(codes, low, mask=there)
        tl.store(codes + HALF, high, mask=there)


@triton.jit
def _decode_kernel(
    key_codes, key_low, key_step, floor, spread, output, codes_head, range_head, output_head,
    CHUNK: tl.constexpr, BLOCK_CHUNK: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """The keys of one slot."""
    LEVELS: tl.constexpr = 2**BITS - 1
    slot = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    token = tl.arange(0, BLOCK_CHUNK).to(tl.int64)[:, None]
    dims = tl.arange(0, BLOCK_HALF)[None, :]
    there = (token < CHUNK) & (dims < HALF)
    low, high = _codes(key_codes + head * codes_head, slot * CHUNK + token, dims, there, HALF, BITS)
    fixed = head * 2 * HALF + dims
    in_half = dims < HALF
    key_low += head * range_head
    key_step += head * range_head
    floor_low = tl.load(floor + fixed, mask=in_half, other=0.0)
    floor_high = tl.load(floor + fixed + HALF, mask=in_half, other=0.0)
    unit_low = tl.load(spread + fixed, mask=in_half, other=0.0) / 255
    unit_high = tl.load(spread + fixed + HALF, mask=in_half, other=0.0) / 255
    low = _affine(low, key_low, key_step, slot, dims, in_half, floor_low, unit_low, HALF, LEVELS)
    high = _affine(high, key_low + HALF, key_step + HALF, slot, dims, in_half, floor_high, unit_high, HALF, LEVELS)
    put = output + head * output_head + (slot * CHUNK + token) * 2 * HALF + dims
    tl.store(put, low.to(output.dtype.element_ty), mask=there)
    tl.store(put + HALF, high.to(output.dtype.element_ty), mask=there)
