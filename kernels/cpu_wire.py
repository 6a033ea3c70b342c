"""Lossless coding of tiles on the CPU, by numba: the twins of ``reference_wire``.

Compiled once, and kept beside this file. Without the interpreter's lock, so that tiles are coded beside other work. The
regions of a tile are shared out to as many threads as torch has.
"""

# ruff: noqa: ANN001, ANN202 (compiled functions are typed by numba, when they are called)

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from offload_triforce.kernels import wire_format
from offload_triforce.kernels.wire_format import WireFormat, parts

BLOCK, GROUP, NEAR, LEVELS = wire_format.BLOCK, wire_format.GROUP, wire_format.NEAR, wire_format.LEVELS
EXTENSION, ESCAPE = wire_format.EXTENSION, wire_format.ESCAPE
BITS = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)  # that are set
LOWEST = np.array([(byte & -byte).bit_length() - 1 if byte else 0 for byte in range(256)], dtype=np.uint8)
BELOW = np.array([-1, -2, 3, 4, 5, 6, 7, 0], dtype=np.int16)  # what an extension says
LEAST_SHARE = 1 << 16  # values that are worth a thread


def wire_encode(kv: Tensor, coded: Tensor, format: WireFormat) -> None:
    """See ``reference_wire.wire_encode``."""
    part = _arrays(coded, format)
    numbers, regions = _numbers(kv), format.regions
    sizes, starts = part["sizes"], part["starts"]
    fixed = (numbers, part["levels"], part["codes"], part["rests"], part["highs"])
    _share(format, lambda first, last: _code_regions(first, last, *fixed, sizes, format.mantissa))
    np.cumsum(sizes[:-1], out=starts[1:])
    starts[0] = 0
    used = int(starts[-1]) + int(sizes[-1])
    part["header"][:] = max(0, used - format.room), format.begins[-1] + used
    fits = int(np.searchsorted(starts + sizes, format.room, side="right")) if used > format.room else regions
    rest = (numbers, part["levels"], part["codes"], starts, part["room"], format.mantissa)
    _share(format, lambda first, last: _extend_regions(first, min(last, fits), *rest))


def wire_decode(coded: Tensor, kv: Tensor, format: WireFormat) -> None:
    """See ``reference_wire.wire_decode``."""
    part = _arrays(coded, format)
    fixed = (part["levels"], part["codes"], part["rests"], part["highs"], part["starts"], part["room"])
    numbers = _numbers(kv)
    _share(format, lambda first, last: _decode_regions(first, last, *fixed, numbers, format.mantissa))


def _numbers(kv: Tensor) -> np.ndarray[Any, Any]:
    return kv.view(torch.int16).numpy().view(np.uint16)


def _arrays(coded: Tensor, format: WireFormat) -> dict[str, np.ndarray[Any, Any]]:
    """The parts as arrays, K and V with their heads in one dimension."""
    part, dim = parts(coded, format), format.head_dim
    highs = part.highs if part.highs is not None else coded[:0].view(2, 0, 1, 1, dim)
    arrays = {name: value.numpy() for name, value in part._replace(highs=None)._asdict().items() if value is not None}
    arrays["highs"] = highs.numpy()
    for name in ("levels", "codes", "rests", "highs"):
        arrays[name] = arrays[name].reshape(-1, *arrays[name].shape[2:])
    return arrays


def _share(format: WireFormat, work: Callable[[int, int], None]) -> None:
    """Let threads do ``work(first, last)`` for all regions."""
    threads = min(torch.get_num_threads(), format.regions, 1 + format.values // LEAST_SHARE)
    if threads == 1:
        work(0, format.regions)
        return
    ends = [format.regions * number // threads for number in range(threads + 1)]
    others = [_pool().submit(work, *share) for share in pairwise(ends[1:])]
    work(ends[0], ends[1])
    for other in others:
        other.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads(), "wire")


@njit(nogil=True, cache=True)
def _code_regions(first, last, kv, levels, codes, rests, highs, sizes, mantissa):
    """Levels, codes, signs and mantissas of some regions, and how much room they take."""
    heads, tokens, dim = kv.shape[1], kv.shape[2], kv.shape[3]
    blocks = levels.shape[1]
    top, lower = np.empty(dim, np.uint8), np.empty(dim, np.uint8)
    hits, most = np.empty(dim, np.uint8), np.empty(dim, np.uint8)
    exponents = np.empty((BLOCK, dim), np.uint8)
    for region in range(first, last):
        row, block = region // blocks, region % blocks
        begin, end = block * BLOCK, min(tokens, (block + 1) * BLOCK)
        source = kv[row // heads, row % heads]
        top[:] = 0
        for token in range(begin, end):
            for d in range(dim):
                bits = source[token, d]
                exponent = np.uint8((bits & np.uint16(0x7FFF)) >> mantissa)
                exponents[token - begin, d] = exponent
                top[d] = max(top[d], exponent)
                rest = np.uint16((bits >> np.uint16(15)) << mantissa) | (bits & np.uint16((1 << mantissa) - 1))
                rests[row, token, d] = np.uint8(rest & np.uint16(0xFF))
        lower[:] = 0
        most[:] = 0
        for tried in range(LEVELS):
            hits[:] = 0
            for token in range(end - begin):
                for d in range(dim):
                    hits[d] += np.uint8(np.uint8(top[d] - exponents[token, d] - np.uint8(tried)) < np.uint8(NEAR))
            for d in range(dim):
                if hits[d] > most[d]:
                    most[d], lower[d] = hits[d], np.uint8(tried)
        level = levels[row, block]
        for d in range(dim):
            level[d] = top[d] - lower[d]
        misses, escapes = _code_groups(exponents, level, codes[row], begin, end)
        if highs.size:
            _put_highs(source, highs[row], begin, end, mantissa)
        sizes[region] = (misses * EXTENSION + 7) // 8 + escapes


@njit(nogil=True, cache=True)
def _code_groups(exponents, level, codes, begin, end):
    """Codes of one region; how many misses and escapes there are."""
    dim = level.shape[0]
    misses, escapes = 0, 0
    for group in range(begin // GROUP, end // GROUP):
        low, high = codes[group, 0], codes[group, 1]
        low[:] = 0
        high[:] = 0
        for token in range(GROUP):
            row = exponents[group * GROUP - begin + token]
            for d in range(dim):
                below = np.uint8(level[d] - row[d])  # above the level: 255, 254, ...
                code = min(below, np.uint8(NEAR))
                low[d] |= np.uint8((code & np.uint8(1)) << np.uint8(token))
                high[d] |= np.uint8((code >> np.uint8(1)) << np.uint8(token))
                misses += code == NEAR
                escapes += (below > 7) & (level[d] >= row[d]) | (level[d] + 2 < row[d])
    return misses, escapes


@njit(nogil=True, cache=True)
def _put_highs(source, highs, begin, end, mantissa):
    """The bits of signs and mantissas that no byte has room for."""
    for group in range(begin // GROUP, end // GROUP):
        highs[group] = 0
        for token in range(GROUP):
            for d in range(source.shape[1]):
                bits = source[group * GROUP + token, d]
                rest = (bits >> 15) << mantissa | bits & ((1 << mantissa) - 1)
                for plane in range(highs.shape[1]):
                    highs[group, plane, d] |= np.uint8((rest >> (8 + plane) & 1) << token)


@njit(nogil=True, cache=True)
def _extend_regions(first, last, kv, levels, codes, starts, room, mantissa):
    """Extensions and escapes of some regions, which all fit."""
    heads, tokens, dim = kv.shape[1], kv.shape[2], kv.shape[3]
    blocks = levels.shape[1]
    for region in range(first, last):
        row, block = region // blocks, region % blocks
        groups = range(block * BLOCK // GROUP, min(tokens, (block + 1) * BLOCK) // GROUP)
        source, level = kv[row // heads, row % heads], levels[row, block]
        place, word, held = np.int64(starts[region]), 0, 0
        escape = place + (_misses(codes[row], groups.start, groups.stop) * EXTENSION + 7) // 8
        for group in groups:
            for d in range(dim):
                missed = np.int64(codes[row, group, 0, d] & codes[row, group, 1, d])
                while missed:
                    token = group * GROUP + np.int64(LOWEST[missed])
                    missed &= missed - 1
                    exponent = np.int64(source[token, d] & 0x7FFF) >> mantissa
                    below = np.int64(level[d]) - np.int64(exponent)
                    extension = -1 - below if below < 0 else below - 1
                    if below < -2 or extension >= ESCAPE:
                        extension = ESCAPE
                        room[escape] = exponent
                        escape += 1
                    word |= extension << held
                    held += EXTENSION
                    if held >= 8:
                        room[place] = word & 0xFF
                        place, word, held = place + 1, word >> 8, held - 8
        if held:
            room[place] = word


@njit(nogil=True, cache=True)
def _misses(codes, first, last):
    misses = 0
    for group in range(first, last):
        for d in range(codes.shape[2]):
            misses += BITS[codes[group, 0, d] & codes[group, 1, d]]
    return misses


@njit(nogil=True, cache=True)
def _decode_regions(first, last, levels, codes, rests, highs, starts, room, kv, mantissa):
    """Decode some regions."""
    heads, tokens, dim = kv.shape[1], kv.shape[2], kv.shape[3]
    blocks = levels.shape[1]
    keep = np.uint16(0x8000 | (1 << mantissa) - 1)
    last_byte = np.int64(room.shape[0]) - 1  # what is no coded tile decodes to anything, but reads no memory of others
    for region in range(first, last):
        row, block = region // blocks, region % blocks
        groups = range(block * BLOCK // GROUP, min(tokens, (block + 1) * BLOCK) // GROUP)
        target, level = kv[row // heads, row % heads], levels[row, block]
        begin, bit = np.int64(starts[region]), 0
        escape = begin + (_misses(codes[row], groups.start, groups.stop) * EXTENSION + 7) // 8
        for group in groups:
            low, high = codes[row, group, 0], codes[row, group, 1]
            _decode_near(low, high, level, rests[row], highs, row, target, group, mantissa)
            for d in range(dim):
                missed = np.int64(low[d] & high[d])
                while missed:
                    token = group * GROUP + np.int64(LOWEST[missed])
                    missed &= missed - 1
                    place, shift = min(max(begin + (bit >> 3), 0), last_byte), bit & 7
                    extension = np.int64(room[place]) >> shift
                    if shift > 5:
                        extension |= np.int64(room[min(place + 1, last_byte)]) << (8 - shift)
                    extension &= 7
                    bit += EXTENSION
                    if extension == ESCAPE:
                        exponent = np.int64(room[min(max(escape, 0), last_byte)])
                        escape += 1
                    else:
                        exponent = np.int64(level[d]) - BELOW[extension]
                    target[token, d] = target[token, d] & keep | exponent << mantissa


@njit(nogil=True, cache=True)
def _decode_near(low, high, level, rests, highs, row, target, group, mantissa):
    """Decode a group of 8 tokens as if it had no misses."""
    widest = np.uint16(0x7FFF >> mantissa)
    for token in range(GROUP):
        number = group * GROUP + token
        for d in range(level.shape[0]):
            shift = np.uint8(token)
            code = (low[d] >> shift & np.uint8(1)) | (high[d] >> shift & np.uint8(1)) << np.uint8(1)
            rest = np.uint16(rests[number, d])
            exponent = np.uint16(np.uint8(level[d] - code)) & widest  # of a miss, below 0 maybe: not into the sign
            if highs.size:
                for plane in range(highs.shape[2]):
                    rest |= np.uint16((highs[row, group, plane, d] >> shift & 1) << (8 + plane))
            sign = np.uint16((rest >> mantissa) << 15)
            target[number, d] = sign | exponent << mantissa | rest & np.uint16((1 << mantissa) - 1)
