"""Packed chunks in Triton: the twins of ``reference_codec``.

Both halves of the head dimension are worked on side by side: a byte of 4-bit codes has a code of each.
"""

# ruff: noqa: ANN001, ANN201, ANN202 (the parameters of kernels are typed by Triton, at launch)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload_triforce.kernels.launch import Launch, run
from offload_triforce.kernels.reference_codec import LEAST_STEP
from offload_triforce.kernels.types import CodedChunks

SMALLEST = tl.constexpr(LEAST_STEP)


def decode_keys(coded: CodedChunks, slots: int, dtype: torch.dtype) -> Tensor:
    """Keys of the first ``slots`` slots, [K, slots * chunk, D] in ``dtype``."""
    heads, dim = coded.floor.shape
    output = torch.empty(heads, slots * coded.chunk, dim, dtype=dtype, device=coded.floor.device)
    run(decode_launch(coded, slots, output))
    return output


def decode_launch(coded: CodedChunks, slots: int, output: Tensor) -> Launch:
    """What ``decode_keys`` launches: a program per slot and KV head."""
    half = output.shape[2] // 2
    arguments = (
        coded.key_codes, coded.key_low, coded.key_step, coded.floor, coded.spread, output,
        coded.key_codes.stride(0), coded.key_low.stride(0), output.stride(0),
        coded.chunk, triton.next_power_of_2(coded.chunk), half, triton.next_power_of_2(half), coded.bits,
    )  # fmt: skip
    return Launch(_decode_kernel, (slots, output.shape[0], 1), arguments, {"num_warps": 2})


@triton.jit
def encode_chunk(
    taken, kv_part, kv_token, head, slot,
    key_codes, value_codes, key_low, key_step, value_low, value_step, floor, spread, codes_head, range_head, token_head,
    CHUNK: tl.constexpr, BLOCK_CHUNK: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Pack the chunk whose keys begin at ``taken``, and whose values lie ``kv_part`` further, into a slot of a head."""
    LEVELS: tl.constexpr = 2**BITS - 1
    token = tl.arange(0, BLOCK_CHUNK).to(tl.int64)[:, None]
    dims = tl.arange(0, BLOCK_HALF)[None, :]
    there = (token < CHUNK) & (dims < HALF)
    taken += token * kv_token + dims
    codes = head * codes_head + (slot * CHUNK + token) * (HALF if BITS == 4 else 2 * HALF) + dims
    ranges = head * range_head + slot * 2 * HALF + dims
    fixed = head * 2 * HALF + dims

    low = _encode_keys(taken, floor, spread, key_low, key_step, ranges, fixed, token, dims, 0, CHUNK, HALF, LEVELS)
    high = _encode_keys(taken, floor, spread, key_low, key_step, ranges, fixed, token, dims, HALF, CHUNK, HALF, LEVELS)
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
