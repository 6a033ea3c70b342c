"""Lossless coding of tiles in Triton: the twins of ``reference_wire``. A program works on one region.

It goes through the region by groups of 8 tokens. The bits of a group's codes lie in one byte per channel, so what comes
before a value is counted by a prefix sum over channels, and by the bits below its own.
"""

# ruff: noqa: ANN001, ANN202 (the parameters of kernels are typed by Triton, at launch)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload_triforce.kernels import wire_format
from offload_triforce.kernels.launch import Bound, Launch, aligned, check_rows, run
from offload_triforce.kernels.wire_format import WireFormat

BLOCK, GROUP, NEAR = (tl.constexpr(value) for value in (wire_format.BLOCK, wire_format.GROUP, wire_format.NEAR))
LEVELS, EXTENSION = tl.constexpr(wire_format.LEVELS), tl.constexpr(wire_format.EXTENSION)
ESCAPE = tl.constexpr(wire_format.ESCAPE)
MANY = 1024  # sizes of regions that are added up at a time

_BOUND: dict[tuple[WireFormat, tuple[int, ...], torch.device], Bound] = {}


def wire_decode(coded: Tensor, kv: Tensor, format: WireFormat) -> None:
    """See ``ops.wire_decode``."""
    check_rows(kv)
    numbers = kv.view(torch.int16)
    if not aligned(coded, kv):
        run(decode_launch(coded, numbers, format))
        return
    kind = (format, kv.stride(), kv.device)
    bound = _BOUND.get(kind)
    if bound is None:
        _BOUND[kind] = Bound(decode_launch(coded, numbers, format), ("coded", "kv"))
    else:
        bound(coded, numbers)


def wire_encode(kv: Tensor, coded: Tensor, format: WireFormat) -> None:
    """See ``ops.wire_encode``. Takes memory of half a tile for itself meanwhile."""
    check_rows(kv)
    numbers = kv.view(torch.int16)
    scratch = torch.empty(format.regions, wire_format.BLOCK * format.head_dim, dtype=torch.uint8, device=kv.device)
    for launch in encode_launches(numbers, coded, format, scratch):
        run(launch)


def decode_launch(coded: Tensor, kv: Tensor, format: WireFormat) -> Launch:
    """What ``wire_decode`` launches; ``kv`` as int16."""
    # No other tensor: a repeated launch has other addresses for these two alone.
    arguments = (coded, kv, *kv.stride()[:3], *format.begins, format.tile_tokens, *_shape(format))
    return Launch(_decode_kernel, _grid(format), arguments, {"num_warps": 4 if format.head_dim <= 256 else 8})


def encode_launches(kv: Tensor, coded: Tensor, format: WireFormat, scratch: Tensor) -> tuple[Launch, Launch]:
    """What ``wire_encode`` launches, one after the other; ``kv`` as int16, ``scratch`` uint8 [regions, BLOCK * D]."""
    warps = {"num_warps": 4 if format.head_dim <= 256 else 8}
    _, levels, codes, rests, highs, room = format.begins
    source, tokens, shape = (kv, *kv.stride()[:3]), format.tile_tokens, _shape(format)
    table = _table(coded, format)
    arguments = (coded, *source, *table, levels, codes, rests, highs, tokens, *shape)
    second = (coded, *source, *table, coded[:8].view(torch.int32), scratch, levels, codes, room, format.room)
    return (
        Launch(_code_kernel, _grid(format), arguments, warps),
        Launch(_extend_kernel, _grid(format), (*second, tokens, *shape, MANY), warps),
    )


def _table(coded: Tensor, format: WireFormat) -> tuple[Tensor]:
    """Sizes of the regions, then starts: int32."""
    begin = format.begins[0]
    return (coded[begin : begin + 8 * format.regions].view(torch.int32),)


def _grid(format: WireFormat) -> tuple[int, int, int]:
    return format.blocks, format.kv_heads, 2


def _shape(format: WireFormat) -> tuple[int, int, int]:
    return format.head_dim, triton.next_power_of_2(format.head_dim), format.mantissa


@triton.jit
def _region(tokens):
    """This program's: part, head, block; its number among all regions; its first group in the tile, and how many."""
    block, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = part * tl.num_programs(1) + head
    first = row * (tokens // GROUP) + block * (BLOCK // GROUP)
    groups = tl.minimum(BLOCK // GROUP, tokens // GROUP - block * (BLOCK // GROUP)).to(tl.int32)
    return part, head, block, row * tl.num_programs(0) + block, first, groups


@triton.jit
def _bits(byte):
    """How many bits of a byte are set."""
    byte = byte - ((byte >> 1) & 0x55)
    byte = (byte & 0x33) + ((byte >> 2) & 0x33)
    return (byte + (byte >> 4)) & 0xF


@triton.jit
def _ranks(flags, before):
    """``flags`` [8, D] (0 or 1): how many are set before each, and how many are set with those ``before``."""
    token = tl.arange(0, 8)[:, None]
    byte = tl.sum(flags << token, 0)
    count = _bits(byte)
    channel = before + tl.cumsum(count, 0) - count
    return channel[None, :] + _bits(byte[None, :] & ((1 << token) - 1)), before + tl.sum(count, 0)


@triton.jit
def _extension(below):
    """See ``reference_wire._extensions``."""
    extension = tl.where(below < 0, -1 - below, below - 1)
    return tl.where((below < -2) | (extension > ESCAPE), ESCAPE, extension)


@triton.jit
def _exponents(kv, token, token_stride, dims, there, MANTISSA: tl.constexpr):
    """Exponents of some tokens, int32; 0 where there are none."""
    bits = tl.load(kv + token.to(tl.int64) * token_stride + dims, mask=there, other=0).to(tl.int32)
    return (bits & 0x7FFF) >> MANTISSA


@triton.jit
def _misses(codes, groups, dims, inside, DIM: tl.constexpr):
    """How many values of a region are misses."""
    group = tl.arange(0, BLOCK // GROUP)[:, None]
    at, there = codes + group * 2 * DIM + dims[None, :], (group < groups) & inside[None, :]
    low = tl.load(at, mask=there, other=0).to(tl.int32)
    high = tl.load(at + DIM, mask=there, other=0).to(tl.int32)
    return tl.sum(tl.sum(_bits(low & high), 1), 0)


@triton.jit
def _decode_kernel(
    coded, kv, part_stride, head_stride, token_stride,
    table_at, levels_at, codes_at, rests_at, highs_at, room_at, tokens,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, MANTISSA: tl.constexpr,
):  # fmt: skip
    """Decode one region."""
    part, head, block, region, first, groups = _region(tokens)
    HIGH: tl.constexpr = MANTISSA - 7
    dims = tl.arange(0, BLOCK_DIM)
    inside = dims < DIM
    number = tl.arange(0, GROUP)
    token, there = number[:, None], (number[:, None] < GROUP) & inside[None, :]
    level = tl.load(coded + levels_at + region * DIM + dims, mask=inside, other=0).to(tl.int32)[None, :]
    codes = coded + codes_at + first * 2 * DIM
    rests = coded + rests_at + first * GROUP * DIM + token * DIM + dims[None, :]
    highs = coded + highs_at + first * HIGH * DIM + dims
    kv += part * part_stride + head * head_stride + block * BLOCK * token_stride
    starts = (coded + table_at).to(tl.pointer_type(tl.int32)) + 2 * tl.num_programs(1) * tl.num_programs(0)
    room = coded + room_at + tl.load(starts + region)
    escapes = room + (_misses(codes, groups, dims, inside, DIM) * EXTENSION + 7) // 8

    missed_before = tl.zeros((), tl.int32)
    escaped_before = tl.zeros((), tl.int32)
    for group in range(groups):
        at = codes + group * 2 * DIM + dims
        low = tl.load(at, mask=inside, other=0).to(tl.int32)[None, :] >> token & 1
        high = tl.load(at + DIM, mask=inside, other=0).to(tl.int32)[None, :] >> token & 1
        missed = low & high
        rank, missed_before = _ranks(missed, missed_before)
        bit = rank * EXTENSION
        place, shift = room + (bit >> 3), bit & 7
        extension = tl.load(place, mask=missed == 1, other=0).to(tl.int32)
        extension |= tl.load(place + 1, mask=(missed == 1) & (shift > 5), other=0).to(tl.int32) << 8
        extension = (extension >> shift) & 7
        below = tl.where(missed == 1, tl.where(extension < 2, -1 - extension, extension + 1), low | high << 1)
        exponent = level - below
        escaped = (missed == 1) & (extension == ESCAPE)
        if tl.sum(tl.sum(escaped.to(tl.int32), 1), 0) > 0:
            rank, escaped_before = _ranks(escaped.to(tl.int32), escaped_before)
            exponent = tl.where(escaped, tl.load(escapes + rank, mask=escaped, other=0).to(tl.int32), exponent)
        rest = tl.load(rests + group * GROUP * DIM, mask=there, other=0).to(tl.int32)
        for plane in tl.static_range(HIGH):
            byte = tl.load(highs + (group * HIGH + plane) * DIM, mask=inside, other=0).to(tl.int32)
            rest |= (byte[None, :] >> token & 1) << (8 + plane)
        bits = (rest >> MANTISSA) << 15 | exponent << MANTISSA | rest & ((1 << MANTISSA) - 1)
        to = kv + (token + group * GROUP).to(tl.int64) * token_stride + dims[None, :]
        tl.store(to, bits.to(tl.int16), mask=there)


@triton.jit
def _code_kernel(
    coded, kv, part_stride, head_stride, token_stride, table,
    levels_at, codes_at, rests_at, highs_at, tokens,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, MANTISSA: tl.constexpr,
):  # fmt: skip
    """Levels, codes, signs and mantissas of one region, and how much room it takes."""
    part, head, block, region, first, groups = _region(tokens)
    HIGH: tl.constexpr = MANTISSA - 7
    dims = tl.arange(0, BLOCK_DIM)
    inside = dims < DIM
    token = tl.arange(0, GROUP)[:, None]
    there = (token < GROUP) & inside[None, :]
    kv += part * part_stride + head * head_stride + block * BLOCK * token_stride

    top = tl.zeros([BLOCK_DIM], tl.int32)
    for group in range(groups):
        exponent = _exponents(kv, token + group * GROUP, token_stride, dims[None, :], there, MANTISSA)
        top = tl.maximum(top, tl.max(exponent, 0))
    lower = tl.zeros([BLOCK_DIM], tl.int32)
    most = tl.zeros([BLOCK_DIM], tl.int32)
    for tried in range(LEVELS):
        hits = tl.zeros([BLOCK_DIM], tl.int32)
        for group in range(groups):
            exponent = _exponents(kv, token + group * GROUP, token_stride, dims[None, :], there, MANTISSA)
            below = top[None, :] - tried - exponent
            hits += tl.sum(((below >= 0) & (below < NEAR)).to(tl.int32), 0)
        lower = tl.where(hits > most, tried, lower)
        most = tl.maximum(most, hits)
    level = top - lower
    tl.store(coded + levels_at + region * DIM + dims, level.to(tl.uint8), mask=inside)

    codes = coded + codes_at + first * 2 * DIM + dims
    rests = coded + rests_at + first * GROUP * DIM + token * DIM + dims[None, :]
    highs = coded + highs_at + first * HIGH * DIM + dims
    misses = tl.zeros((), tl.int32)
    escapes = tl.zeros((), tl.int32)
    for group in range(groups):
        at = kv + (token + group * GROUP).to(tl.int64) * token_stride + dims[None, :]
        bits = tl.load(at, mask=there, other=0).to(tl.int32) & 0xFFFF
        rest = (bits >> 15) << MANTISSA | bits & ((1 << MANTISSA) - 1)
        tl.store(rests + group * GROUP * DIM, rest.to(tl.uint8), mask=there)
        for plane in tl.static_range(HIGH):
            byte = tl.sum((rest >> (8 + plane) & 1) << token, 0)
            tl.store(highs + (group * HIGH + plane) * DIM, byte.to(tl.uint8), mask=inside)
        below = level[None, :] - ((bits & 0x7FFF) >> MANTISSA)
        missed = ((below < 0) | (below >= NEAR)) & there
        code = tl.where(missed, NEAR, below)
        low, high = tl.sum((code & 1) << token, 0), tl.sum((code >> 1) << token, 0)
        tl.store(codes + group * 2 * DIM, low.to(tl.uint8), mask=inside)
        tl.store(codes + group * 2 * DIM + DIM, high.to(tl.uint8), mask=inside)
        misses += tl.sum(tl.sum(missed.to(tl.int32), 1), 0)
        escapes += tl.sum(tl.sum((missed & (_extension(below) == ESCAPE)).to(tl.int32), 1), 0)
    tl.store(table + region, (misses * EXTENSION + 7) // 8 + escapes)


@triton.jit
def _extend_kernel(
    coded, kv, part_stride, head_stride, token_stride, table, header, scratch,
    levels_at, codes_at, room_at, room_bytes, tokens,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, MANTISSA: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """Extensions and escapes of one region, once the sizes of all are known."""
    part, head, block, region, first, groups = _region(tokens)
    regions = 2 * tl.num_programs(1) * tl.num_programs(0)
    start = tl.zeros((), tl.int32)
    for some in range(0, region, MANY):
        before = some + tl.arange(0, MANY)
        start += tl.sum(tl.load(table + before, mask=before < region, other=0), 0)
    size = tl.load(table + region)
    tl.store(table + regions + region, start)
    if region == regions - 1:
        tl.store(header, tl.maximum(start + size - room_bytes, 0))
        tl.store(header + 1, room_at + start + size)
    if start + size <= room_bytes:
        dims = tl.arange(0, BLOCK_DIM)
        inside = dims < DIM
        token = tl.arange(0, GROUP)[:, None]
        there = (token < GROUP) & inside[None, :]
        kv += part * part_stride + head * head_stride + block * BLOCK * token_stride
        level = tl.load(coded + levels_at + region * DIM + dims, mask=inside, other=0).to(tl.int32)[None, :]
        codes = coded + codes_at + first * 2 * DIM
        misses = _misses(codes, groups, dims, inside, DIM)
        room = coded + room_at + start
        escapes = room + (misses * EXTENSION + 7) // 8
        scratch += region * BLOCK * DIM
        missed_before = tl.zeros((), tl.int32)
        escaped_before = tl.zeros((), tl.int32)
        for group in range(groups):
            exponent = _exponents(kv, token + group * GROUP, token_stride, dims[None, :], there, MANTISSA)
            below = level - exponent
            missed = ((below < 0) | (below >= NEAR)) & there
            rank, missed_before = _ranks(missed.to(tl.int32), missed_before)
            extension = _extension(below)
            tl.store(scratch + rank, extension.to(tl.uint8), mask=missed)
            escaped = missed & (extension == ESCAPE)
            rank, escaped_before = _ranks(escaped.to(tl.int32), escaped_before)
            tl.store(escapes + rank, exponent.to(tl.uint8), mask=escaped)
        tl.debug_barrier()  # what follows reads what all threads have written
        eighth = tl.arange(0, 8)[None, :]
        for done in range(0, misses, 8 * BLOCK_DIM):
            packed = done // 8 + dims  # of eight extensions, three bytes
            rank = packed[:, None] * 8 + eighth
            extension = tl.load(scratch + rank, mask=rank < misses, other=0).to(tl.int32)
            word = tl.sum(extension << (eighth * EXTENSION), 1)
            for byte in tl.static_range(EXTENSION):
                place = packed * EXTENSION + byte
                held = place < (misses * EXTENSION + 7) // 8
                tl.store(room + place, (word >> (8 * byte)).to(tl.uint8), mask=held)
