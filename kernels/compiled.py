"""Loops for the CPU, compiled by numba: what torch needs many passes over memory for, in one.

They serve what level 1 drafts from, nothing that the target's own attention comes from: torch's fused kernel is as fast
as memory there. Each runs on the caller's thread alone and lets go of the interpreter's lock, so that any number of
threads may be in them. Where numba is missing, the eager twins serve.

The first call on a machine compiles, which takes seconds; what is compiled is kept on disk, beside this file or in the
user's cache folder.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from offload_triforce.kernels.types import ChunkSelection, CodedChunks

# Sums in any order. Infinities and NaN stay what they are.
FAST = {"reassoc", "contract", "nsz"}
FLOAT, BFLOAT, HALF = 0, 1, 2
NUMBERS = {torch.float32: FLOAT, torch.bfloat16: BFLOAT, torch.float16: HALF}

Array = np.ndarray[Any, Any]


def chunk_scores(
    packed: Tensor, key: Tensor, chunk: int, scaling: float, baseline: Tensor, held: Tensor | None = None
) -> Tensor:
    """See ``reference.chunk_scores``. Mean keys are not rounded."""
    heads, chunks = key.shape[0], key.shape[1] // chunk
    scores = torch.empty(heads, chunks)
    taken = np.zeros((heads, 0), dtype=np.bool_) if held is None else held.numpy()
    query, number = packed.float().numpy(), NUMBERS[key.dtype]
    _chunk_scores(query, _bits(key), number, chunk, np.float32(scaling), baseline.numpy(), taken, scores.numpy())
    return scores


def select_chunks(selection: ChunkSelection, offered: Tensor, first: int) -> Tensor:
    """See ``reference.select_chunks``."""
    source = torch.full(selection.chunks.shape, -1, dtype=torch.long)
    _select(*(part.numpy() for part in selection), offered.numpy(), first, source.numpy())
    return source


def decode_chunks(coded: CodedChunks, slots: int) -> tuple[Tensor, Tensor]:
    """See ``reference_codec.decode_chunks``."""
    heads, _, chunk, _ = coded.key_codes.shape
    kv = torch.empty(2, heads, slots * chunk, coded.floor.shape[1])
    _decode_keys(
        *(part.numpy() for part in (coded.key_codes, coded.key_low, coded.key_step, coded.floor, coded.spread)),
        coded.bits,
        slots,
        kv[0].numpy(),
    )
    low, step = (part[:, :slots].float().numpy() for part in (coded.value_low, coded.value_step))
    _decode_values(coded.value_codes.numpy(), low, step, coded.bits, kv[1].numpy())
    return kv[0], kv[1]


def _bits(tensor: Tensor) -> Array:
    """float32 as it is, 16-bit numbers as uint16, which numba knows: no copy."""
    return tensor.numpy() if tensor.dtype == torch.float32 else tensor.view(torch.uint16).numpy()


@njit(cache=True, nogil=True, fastmath=FAST)
def _add_row(row: Array, number: int, wide: Array, total: Array) -> None:
    """Add a row [D] of numbers of that kind to ``total`` (float32). ``wide``: room for as many."""
    bits = wide.view(np.uint32)
    if number == 0:
        for d in range(len(total)):
            total[d] += row[d]
        return
    if number == 1:
        for d in range(len(total)):
            bits[d] = np.uint32(row[d]) << np.uint32(16)
    else:
        for d in range(len(total)):
            low = (np.uint32(row[d]) & np.uint32(0x7FFF)) << np.uint32(13)
            # The exponent is 112 too small. An infinity's and a NaN's is raised twice, so that they become infinite.
            bits[d] = low + np.uint32(0x38000000) if low >= np.uint32(0x0F800000) else low
        for d in range(len(total)):
            wide[d] *= np.float32(2.0**112)  # subnormals become normal
            bits[d] |= (np.uint32(row[d]) & np.uint32(0x8000)) << np.uint32(16)
    for d in range(len(total)):
        total[d] += wide[d]


@njit(cache=True, nogil=True, fastmath=FAST)
def _chunk_scores(
    query: Array,
    key: Array,
    number: int,
    chunk: int,
    scaling: float,
    baseline: Array,
    held: Array,
    scores: Array,
) -> None:
    """query [K, R, D], key [K, C*chunk, D], baseline [K, R], held [K, C] or [K, 0], scores [K, C]."""
    heads, rows, dim = query.shape
    mean, wide = np.empty(dim, dtype=np.float32), np.empty(dim, dtype=np.float32)
    wishes, factor = np.empty(rows, dtype=np.float32), np.float32(scaling / chunk)
    for head in range(heads):
        for place in range(scores.shape[1]):
            if held.shape[1] and held[head, place]:
                scores[head, place] = -np.inf
                continue
            mean[:] = 0
            for token in range(place * chunk, (place + 1) * chunk):
                _add_row(key[head, token], number, wide, mean)
            highest = np.float32(-np.inf)
            for row in range(rows):
                wish, q = np.float32(0), query[head, row]
                for d in range(dim):
                    wish += q[d] * mean[d]
                wishes[row] = wish * factor - baseline[head, row]
                highest = max(highest, wishes[row])
            total = np.float32(0)
            for row in range(rows):
                total += math.exp(wishes[row] - highest)
            scores[head, place] = highest + math.log(total)


@njit(cache=True, nogil=True)
def _select(scores: Array, chunks: Array, held: Array, offered: Array, first: int, source: Array) -> None:
    """``reference.select_chunks``, head by head; ``source`` [K, k] is all -1 before."""
    slots, nobody = scores.shape[1], held.shape[1] - 1
    for head in range(len(scores)):
        if not offered[head].max() > scores[head].min():
            continue
        both = np.concatenate((scores[head], offered[head]))
        order = np.argsort(-both, kind="mergesort")[:slots]
        best = np.zeros(len(both), dtype=np.bool_)
        for place in order:
            best[place] = both[place] > -np.inf
        slot = 0
        for place in range(slots, len(both)):
            if not best[place]:
                continue
            while best[slot]:
                slot += 1
            if chunks[head, slot] >= 0:
                held[head, chunks[head, slot]] = False
            source[head, slot] = place - slots
            slot += 1
        for slot in range(slots):
            if source[head, slot] >= 0:
                chunks[head, slot] = first + source[head, slot]
                scores[head, slot] = offered[head, source[head, slot]]
                held[head, chunks[head, slot]] = True
        held[head, nobody] = False


@njit(cache=True, nogil=True, fastmath=FAST)
def _unpack(codes: Array, bits: int, numbers: Array) -> None:
    """Codes of one token, [D * bits / 8] bytes, to float32 [D]."""
    if bits == 8:
        for d in range(len(numbers)):
            numbers[d] = codes[d]
        return
    half = len(numbers) // 2
    for d in range(half):
        numbers[d] = codes[d] & np.uint8(15)
    for d in range(half):
        numbers[half + d] = codes[d] >> np.uint8(4)


@njit(cache=True, nogil=True, fastmath=FAST)
def _decode_keys(
    codes: Array, lows: Array, steps: Array, floor: Array, spread: Array, bits: int, slots: int, keys: Array
) -> None:
    """codes [K, k, chunk, bytes], lows and steps [K, k, D], floor and spread [K, D], keys [K, slots*chunk, D]."""
    chunk, dim = codes.shape[2], keys.shape[2]
    low, step, levels = np.empty(dim, dtype=np.float32), np.empty(dim, dtype=np.float32), np.float32(2**bits - 1)
    for head in range(len(keys)):
        for slot in range(slots):
            for d in range(dim):
                scale = spread[head, d] / np.float32(255)
                low[d] = floor[head, d] + scale * np.float32(lows[head, slot, d])
                step[d] = scale / levels * np.float32(steps[head, slot, d])
            for token in range(chunk):
                out = keys[head, slot * chunk + token]
                _unpack(codes[head, slot, token], bits, out)
                for d in range(dim):
                    out[d] = low[d] + step[d] * out[d]


@njit(cache=True, nogil=True, fastmath=FAST)
def _decode_values(codes: Array, lows: Array, steps: Array, bits: int, values: Array) -> None:
    """codes [K, k, chunk, bytes], lows and steps float32 [K, slots, chunk], values [K, slots*chunk, D]."""
    chunk, dim = codes.shape[2], values.shape[2]
    for head in range(len(values)):
        for slot in range(lows.shape[1]):
            for token in range(chunk):
                out = values[head, slot * chunk + token]
                _unpack(codes[head, slot, token], bits, out)
                low, step = lows[head, slot, token], steps[head, slot, token]
                for d in range(dim):
                    out[d] = low + step * out[d]
