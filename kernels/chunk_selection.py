"""Choosing chunks while they stream by, in Triton: the twins of ``reference.chunk_scores``, ``select_chunks`` and
``gather_chunks``. Nothing here waits for the device, and offsets are int64 throughout.
"""

# ruff: noqa: ANN001, ANN202 (the parameters of kernels are typed by Triton, at launch)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload_triforce.kernels.types import ChunkSelection

LARGEST = tl.constexpr(3.4028234663852886e38)

Launch = tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]


def chunk_scores(
    packed: Tensor, key: Tensor, chunk: int, scaling: float, baseline: Tensor, held: Tensor | None = None
) -> Tensor:
    """How much the queries of the block want each chunk of ``key`` [K, C*chunk, D]: float32 [K, C]."""
    _check_rows(packed, key)
    heads, tokens, _ = key.shape
    output = torch.empty(heads, tokens // chunk, dtype=torch.float32, device=key.device)
    grid, arguments, options = score_arguments(packed, key, chunk, scaling, baseline, held, output)
    _score_kernel[grid](*arguments, **options)
    return output


def score_arguments(
    packed: Tensor, key: Tensor, chunk: int, scaling: float, baseline: Tensor, held: Tensor | None, output: Tensor
) -> Launch:
    """What ``chunk_scores`` launches: one program per KV head and 16 chunks."""
    (heads, rows, dim), chunks = packed.shape, output.shape[1]
    padded = max(16, triton.next_power_of_2(dim))
    step = min(triton.next_power_of_2(chunk), 1024 // padded)  # tokens of a chunk at a time: what registers hold
    held_strides = (0, 0) if held is None else held.stride()
    arguments = (
        packed, key, baseline, held, output, scaling, rows, chunks,
        packed.stride(0), packed.stride(1), key.stride(0), key.stride(1),
        *baseline.stride(), *held_strides, chunk, dim, padded, step, 16, 16,
    )  # fmt: skip
    return (-(-chunks // 16), heads), arguments, {"num_warps": 8, "num_stages": 1}


def select_chunks(selection: ChunkSelection, offered: Tensor, first: int) -> Tensor:
    """One step of a streaming top-k, in place. Returns which offered chunk enters each slot, or -1: int64 [K, k]."""
    _check_rows(*selection, offered)
    heads, slots = selection.scores.shape
    source = torch.empty(heads, slots, dtype=torch.long, device=offered.device)
    scratch = torch.empty(heads, slots + 2 * offered.shape[1], dtype=torch.int32, device=offered.device)
    ranking, assigning = select_arguments(selection, offered, first, source, scratch)
    _rank_kernel[ranking[0]](*ranking[1], **ranking[2])
    _assign_kernel[assigning[0]](*assigning[1], **assigning[2])
    return source


def select_arguments(
    selection: ChunkSelection, offered: Tensor, first: int, source: Tensor, scratch: Tensor
) -> tuple[Launch, Launch]:
    """What ``select_chunks`` launches: marking the best, then giving those that enter a slot.

    ``scratch`` [K, k + 2C] holds a mark for each held and offered chunk, then the list of those that enter.
    """
    scores, chunks, held = selection
    (heads, slots), count = scores.shape, offered.shape[1]
    sizes = (slots, count, scores.stride(0), offered.stride(0))
    ranking = (scores, offered, scratch, *sizes, 64, 128)
    assigning = (
        scores, chunks, held, offered, scratch, source, first, *sizes, chunks.stride(0), held.stride(0),
        triton.next_power_of_2(slots), triton.next_power_of_2(max(count, 256)),  # few sizes: each is compiled once
    )  # fmt: skip
    warps = 8 if slots + count > 1024 else 4
    return (
        ((-(-(slots + count) // 64), heads), ranking, {"num_warps": 4}),
        ((heads,), assigning, {"num_warps": warps}),
    )


def gather_chunks(source: Tensor, kv: Tensor, slots: Tensor) -> None:
    """Copy the chunks that enter out of a tile: ``kv`` [2, K, C*chunk, D] to ``slots`` [2, K, k, chunk, D]."""
    _check_rows(source, kv, slots)
    grid, arguments, options = gather_arguments(source, kv, slots)
    _gather_kernel[grid](*arguments, **options)


def gather_arguments(source: Tensor, kv: Tensor, slots: Tensor) -> Launch:
    """What ``gather_chunks`` launches: one program per slot, KV head, and K or V."""
    heads, count = source.shape
    chunk, dim = slots.shape[3:]
    padded = triton.next_power_of_2(dim)
    step = min(triton.next_power_of_2(chunk), 4096 // padded)
    arguments = (source, kv, slots, source.stride(0), *kv.stride()[:3], *slots.stride()[:4], chunk, dim, padded, step)
    return (count, heads, 2), arguments, {"num_warps": 4 if chunk * dim > 512 else 1}


def _check_rows(*tensors: Tensor) -> None:
    """The kernels take the last dimension to be contiguous, which every caller's buffer is."""
    for tensor in tensors:
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"last dimension of a tensor of shape {list(tensor.shape)} has stride {tensor.stride(-1)}")


@triton.jit(do_not_specialize=["rows", "chunks", "baseline_head", "baseline_row", "held_head", "held_column"])
def _score_kernel(
    query, key, baseline, held, output, scale, rows, chunks,
    query_head, query_row, key_head, key_column, baseline_head, baseline_row, held_head, held_column,
    CHUNK: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, STEP: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Mean keys of a block of chunks, then log-sum-exp of their wishes over all rows."""
    head = tl.program_id(1).to(tl.int64)
    number = tl.program_id(0) * BLOCK_CHUNKS + tl.arange(0, BLOCK_CHUNKS)
    dims = tl.arange(0, BLOCK_DIM)
    steps = tl.arange(0, STEP)
    in_dim = dims < DIM
    exists = number < chunks
    starts = key + head * key_head + number.to(tl.int64)[:, None, None] * CHUNK * key_column + dims[None, None, :]
    means = tl.zeros([BLOCK_CHUNKS, BLOCK_DIM], tl.float32)
    for begin in range(0, CHUNK, STEP):
        token = begin + steps
        there = exists[:, None, None] & (token < CHUNK)[None, :, None] & in_dim[None, None, :]
        k = tl.load(starts + token.to(tl.int64)[None, :, None] * key_column, mask=there, other=0.0)
        means += tl.sum(k.to(tl.float32), 1)
    means = means / CHUNK

    highest = tl.full([BLOCK_CHUNKS], -LARGEST, tl.float32)
    mass = tl.zeros([BLOCK_CHUNKS], tl.float32)
    for begin in range(0, rows, BLOCK_ROWS):
        row = begin + tl.arange(0, BLOCK_ROWS)
        wide = row.to(tl.int64)
        there = (row < rows)[:, None] & in_dim[None, :]
        q = tl.load(query + head * query_head + wide[:, None] * query_row + dims[None, :], mask=there, other=0.0)
        base = tl.load(baseline + head * baseline_head + wide * baseline_row, mask=row < rows, other=float("inf"))
        wishes = tl.dot(means, tl.trans(q.to(tl.float32)), input_precision="ieee") * scale - base[None, :]
        # Kept finite, for a baseline may be infinite and the difference of two infinities is a NaN.
        higher = tl.minimum(tl.maximum(highest, tl.max(wishes, 1)), LARGEST)
        mass = mass * tl.exp(highest - higher) + tl.sum(tl.exp(wishes - higher[:, None]), 1)
        highest = higher
    scores = highest + tl.log(mass)
    if held is not None:
        taken = tl.load(held + head * held_head + number.to(tl.int64) * held_column, mask=exists, other=1) != 0
        scores = tl.where(taken, float("-inf"), scores)
    tl.store(output + head * chunks + number, scores, mask=exists)


@triton.jit
def _load_both(scores, offered, place, slots, count):
    """Scores of the held chunks, then of those on offer, as one list."""
    held = tl.load(scores + place, mask=place < slots, other=float("-inf"))
    new = tl.load(offered + (place - slots), mask=(place >= slots) & (place < slots + count), other=float("-inf"))
    return tl.where(place < slots, held, new)


@triton.jit(do_not_specialize=["slots", "count", "scores_head", "offered_head"])
def _rank_kernel(
    scores, offered, scratch, slots, count, scores_head, offered_head, BLOCK: tl.constexpr, STEP: tl.constexpr
):
    """Mark who is among the best k: whoever is beaten by fewer than k. Earlier places win ties."""
    head = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    scores += head * scores_head
    offered += head * offered_head
    mine = _load_both(scores, offered, place, slots, count)
    beaten = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, slots + count, STEP):
        rival = begin + tl.arange(0, STEP)
        theirs = _load_both(scores, offered, rival, slots, count)[None, :]
        beats = (theirs > mine[:, None]) | ((theirs == mine[:, None]) & (rival[None, :] < place[:, None]))
        beaten += tl.sum(beats.to(tl.int32), 1)
    best = (beaten < slots) & (mine > float("-inf"))
    tl.store(scratch + head * (slots + 2 * count) + place, best.to(tl.int32), mask=place < slots + count)


@triton.jit(do_not_specialize=["first", "slots", "count", "scores_head", "offered_head", "chunks_head", "held_head"])
def _assign_kernel(
    scores, chunks, held, offered, scratch, source, first, slots, count,
    scores_head, offered_head, chunks_head, held_head, BLOCK_SLOTS: tl.constexpr, BLOCK_COUNT: tl.constexpr,
):  # fmt: skip
    """The n-th chunk to enter goes to the n-th free slot. One program per KV head, which alone touches its rows."""
    head = tl.program_id(0).to(tl.int64)
    scratch += head * (slots + 2 * count)
    entering = scratch + slots + count
    column = tl.arange(0, BLOCK_COUNT)
    enters = tl.load(scratch + slots + column, mask=column < count, other=0)
    tl.store(entering + tl.cumsum(enters, 0) - 1, column, mask=enters != 0)
    tl.debug_barrier()  # the list is read by other threads than those that wrote it

    slot = tl.arange(0, BLOCK_SLOTS)
    exists = slot < slots
    free = tl.where(exists, 1 - tl.load(scratch + slot, mask=exists, other=1), 0)
    nth = tl.cumsum(free, 0)
    moved = (free != 0) & (nth <= tl.sum(enters, 0))
    chunk = tl.load(entering + nth - 1, mask=moved, other=-1).to(tl.int64)
    tl.store(source + head * slots + slot, chunk, mask=exists)

    old = tl.load(chunks + head * chunks_head + slot, mask=moved, other=-1)
    held += head * held_head
    tl.store(held + old, tl.zeros([BLOCK_SLOTS], tl.int1), mask=moved & (old >= 0))
    tl.store(held + first + chunk, tl.full([BLOCK_SLOTS], 1, tl.int1), mask=moved)
    tl.store(chunks + head * chunks_head + slot, first + chunk, mask=moved)
    score = tl.load(offered + head * offered_head + chunk, mask=moved, other=0.0)
    tl.store(scores + head * scores_head + slot, score, mask=moved)


@triton.jit(do_not_specialize=["source_head"])
def _gather_kernel(
    source, kv, slots, source_head, kv_part, kv_head, kv_token, slots_part, slots_head, slots_slot, slots_token,
    CHUNK: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One chunk of keys or of values into one slot, if one enters there."""
    slot = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2).to(tl.int64)
    chunk = tl.load(source + head * source_head + slot)
    if chunk < 0:
        return
    dims = tl.arange(0, BLOCK_DIM)[None, :]
    taken = kv + part * kv_part + head * kv_head + chunk * CHUNK * kv_token + dims
    put = slots + part * slots_part + head * slots_head + slot * slots_slot + dims
    for begin in range(0, CHUNK, STEP):
        token = (begin + tl.arange(0, STEP)).to(tl.int64)[:, None]
        there = (token < CHUNK) & (dims < DIM)
        tl.store(put + token * slots_token, tl.load(taken + token * kv_token, mask=there), mask=there)
