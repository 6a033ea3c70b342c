"""One step of a streaming top-k over the chunks of a tile, in Triton: the twin of ``reference.take_chunks``.

Ranking what is held and what is offered, giving those that enter a slot, and copying or packing them: one launch.
Several programs share out the chunks of a KV head that enter. Each finds out by itself which those are, since that
costs less than waiting for another; whoever is the last to have read the selection brings it up to date.
"""

# ruff: noqa: ANN001, ANN202 (the parameters of kernels are typed by Triton, at launch)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload_triforce.kernels.kv_codec import encode_chunk
from offload_triforce.kernels.launch import Launch, check_rows, run
from offload_triforce.kernels.types import ChunkSelection, CodedChunks

# Programs of all KV heads together: enough to pack a tile's chunks at once when a choice is made for the first time.
PROGRAMS = 64
# Parameters that need no code of their own for 1 and for multiples of 16.
NUMBERS = ("first", "slots", "count", "scores_head", "chunks_head", "held_head", "offered_head")


class Workspace(NamedTuple):
    """What the programs of a KV head tell each other: which slot gets which chunk, int32 [2, K, k], and how many of
    them have read the selection, int32 [K]. The latter is zero before a launch, and after it.
    """

    entering: Tensor
    arrived: Tensor


def make_workspace(selection: ChunkSelection) -> Workspace:
    """Room for ``take_chunks`` with selections of this size."""
    heads, slots = selection.scores.shape
    device = selection.scores.device
    return Workspace(
        torch.empty(2, heads, slots, dtype=torch.int32, device=device),
        torch.zeros(heads, dtype=torch.int32, device=device),
    )


def take_chunks(
    selection: ChunkSelection,
    offered: Tensor,
    first: int,
    kv: Tensor,
    slots: Tensor | CodedChunks,
    workspace: Workspace | None = None,
) -> None:
    """Take the best of the offered chunks out of a tile, in place of those that are wanted less.

    Args:
        selection: what is held; brought up to date. offered: float32 [K, C], scores of chunks ``first``, first + 1, ...
        kv: the chunks themselves, [2, K, C*chunk, D]. slots: where those that enter are copied or packed to.
        workspace: from ``make_workspace``; not shared by launches that may run at the same time.
    """
    run(take_launch(selection, offered, first, kv, slots, workspace or make_workspace(selection)))


def take_launch(
    selection: ChunkSelection,
    offered: Tensor,
    first: int,
    kv: Tensor,
    slots: Tensor | CodedChunks,
    workspace: Workspace,
) -> Launch:
    """What ``take_chunks`` launches: a few programs per KV head."""
    check_rows(*selection, offered, kv)
    scores, chunks, held = selection
    (heads, places), count = scores.shape, offered.shape[1]
    size = triton.next_power_of_2(max(places + count, 512))  # few sizes: each is compiled once
    shared = (
        scores, chunks, held, offered, *workspace, kv, first, places, count,
        scores.stride(0), chunks.stride(0), held.stride(0), offered.stride(0), *kv.stride()[:3],
    )  # fmt: skip
    grid = (1 if kv.is_cpu else max(1, min(16, PROGRAMS // heads)), heads, 1)  # the interpreter has one thread
    dim = kv.shape[3]
    chunk = slots.chunk if isinstance(slots, CodedChunks) else slots.shape[3]
    options = {"num_warps": 8 if size > 2048 or chunk * dim > 4096 else 4}
    if isinstance(slots, CodedChunks):
        half = dim // 2
        sizes = (chunk, triton.next_power_of_2(chunk), half, triton.next_power_of_2(half), slots.bits, size)
        strides = (slots.key_codes.stride(0), slots.key_low.stride(0), slots.value_low.stride(0))
        return Launch(_take_packed_kernel, grid, (*shared, *slots, *strides, *sizes), options)
    check_rows(slots)
    padded = triton.next_power_of_2(dim)
    step = min(triton.next_power_of_2(chunk), max(1, 4096 // padded))
    return Launch(
        _take_plain_kernel, grid, (*shared, slots, *slots.stride()[:4], chunk, dim, padded, step, size), options
    )


@triton.jit
def _load_both(scores, offered, place, slots, count):
    """Scores of the held chunks, then of those on offer, as one list."""
    held = tl.load(scores + place, mask=place < slots, other=float("-inf"))
    new = tl.load(offered + (place - slots), mask=(place >= slots) & (place < slots + count), other=float("-inf"))
    return tl.where(place < slots, held, new)


@triton.jit
def _best(mine, slots):
    """Who is among the best: exactly ``slots`` of those above -inf, if there are as many. Earlier places win ties."""
    bits = (mine + 0.0).to(tl.int32, bitcast=True)  # -0 becomes 0, which it equals
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # whole numbers in the order of the floats
    # The largest bound that is reached by as many as there are slots, found bit by bit.
    bound = tl.where(tl.sum((order >= 0).to(tl.int32), 0) >= slots, 0, -0x80000000).to(tl.int32)
    for bit in range(31):
        higher = bound + (0x40000000 >> bit)
        bound = tl.where(tl.sum((order >= higher).to(tl.int32), 0) >= slots, higher, bound)
    ties = (order == bound).to(tl.int32)
    room = slots - tl.sum((order > bound).to(tl.int32), 0)
    return ((order > bound) | ((ties != 0) & (tl.cumsum(ties, 0) <= room))) & (mine > float("-inf"))


@triton.jit
def _choose(
    scores, chunks, held, offered, entering, arrived, first, slots, count,
    scores_head, chunks_head, held_head, offered_head, BLOCK: tl.constexpr,
):  # fmt: skip
    """Bring the selection of one KV head up to date. Returns how many chunks enter, and where the list of them begins.

    The n-th chunk to enter goes to the n-th free slot.
    """
    head = tl.program_id(1).to(tl.int64)
    scores += head * scores_head
    chunks += head * chunks_head
    held += head * held_head
    offered += head * offered_head
    into = entering + head * slots
    which = into + tl.num_programs(1).to(tl.int64) * slots

    place = tl.arange(0, BLOCK)
    mine = _load_both(scores, offered, place, slots, count)
    total = slots * 0
    least = tl.min(tl.where(place < slots, mine, float("inf")), 0)
    if tl.max(tl.where(place < slots, float("-inf"), mine), 0) > least:  # else nothing enters, as with most tiles
        best = _best(mine, slots)
        enters = (best & (place >= slots)).to(tl.int32)
        free = ((place < slots) & (best == 0)).to(tl.int32)
        total = tl.sum(enters, 0)
        nth = tl.cumsum(free, 0)
        tl.store(into + nth - 1, place, mask=(free != 0) & (nth <= total))
        tl.store(which + tl.cumsum(enters, 0) - 1, place - slots, mask=enters != 0)
        tl.debug_barrier()  # the list is read by other threads than those that wrote it
        if tl.atomic_add(arrived + head, 1, sem="acq_rel") == tl.num_programs(0) - 1:  # all have read the selection
            _move(scores, chunks, held, offered, into, which, first, total)
            tl.store(arrived + head, 0)
    return total, into, which


@triton.jit
def _move(scores, chunks, held, offered, into, which, first, total):
    """Write into the selection of one KV head which chunks have entered."""
    for begin in range(0, total, 256):
        number = begin + tl.arange(0, 256)
        there = number < total
        slot = tl.load(into + number, mask=there, other=0)
        chunk = tl.load(which + number, mask=there, other=0)
        old = tl.load(chunks + slot, mask=there, other=-1)
        tl.store(held + old, tl.zeros([256], tl.int1), mask=there & (old >= 0))
        tl.store(held + (first + chunk).to(tl.int64), tl.full([256], 1, tl.int1), mask=there)
        tl.store(chunks + slot, (first + chunk).to(tl.int64), mask=there)
        tl.store(scores + slot, tl.load(offered + chunk, mask=there, other=0.0), mask=there)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=[*ChunkSelection._fields, *CodedChunks._fields])
def _take_packed_kernel(
    scores, chunks, held, offered, entering, arrived, kv, first, slots, count,
    scores_head, chunks_head, held_head, offered_head, kv_part, kv_head, kv_token,
    key_codes, value_codes, key_low, key_step, value_low, value_step, floor, spread, codes_head, range_head, token_head,
    CHUNK: tl.constexpr, BLOCK_CHUNK: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Choose, then pack what enters."""
    total, into, which = _choose(
        scores, chunks, held, offered, entering, arrived, first, slots, count,
        scores_head, chunks_head, held_head, offered_head, BLOCK,
    )  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    for number in range(tl.program_id(0), total, tl.num_programs(0)):
        slot, chunk = tl.load(into + number).to(tl.int64), tl.load(which + number).to(tl.int64)
        taken = kv + head * kv_head + chunk * CHUNK * kv_token
        encode_chunk(
            taken, kv_part, kv_token, head, slot,
            key_codes, value_codes, key_low, key_step, value_low, value_step, floor, spread,
            codes_head, range_head, token_head, CHUNK, BLOCK_CHUNK, HALF, BLOCK_HALF, BITS,
        )  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=[*ChunkSelection._fields, "store"])
def _take_plain_kernel(
    scores, chunks, held, offered, entering, arrived, kv, first, slots, count,
    scores_head, chunks_head, held_head, offered_head, kv_part, kv_head, kv_token,
    store, store_part, store_head, store_slot, store_token,
    CHUNK: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Choose, then copy what enters."""
    total, into, which = _choose(
        scores, chunks, held, offered, entering, arrived, first, slots, count,
        scores_head, chunks_head, held_head, offered_head, BLOCK,
    )  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, BLOCK_DIM)[None, :]
    for number in range(tl.program_id(0), total, tl.num_programs(0)):
        slot, chunk = tl.load(into + number).to(tl.int64), tl.load(which + number).to(tl.int64)
        taken = kv + head * kv_head + chunk * CHUNK * kv_token + dims
        put = store + head * store_head + slot * store_slot + dims
        for begin in tl.static_range(0, CHUNK, STEP):
            token = (begin + tl.arange(0, STEP)).to(tl.int64)[:, None]
            there = (token < CHUNK) & (dims < DIM)
            key = tl.load(taken + token * kv_token, mask=there)
            value = tl.load(taken + kv_part + token * kv_token, mask=there)
            tl.store(put + token * store_token, key, mask=there)
            tl.store(put + store_part + token * store_token, value, mask=there)
