"""Attention straight from packed chunks, in Triton: a step of the retrieval level reads the codes once.

Almost nothing is unpacked. With ``low``, ``step`` and ``code`` as in ``reference_codec``, and u = spread / 255:

    q . key   = q . (floor + 128 u) + (q u) . (low - 128 + step * code / levels)
    w * value = w * (low + centre * step) + (w * step) * (code - centre)

so floors, spreads and the values' ranges go into the queries, the scores and the weights, once per row instead of once
per number, and small whole numbers remain, which float16 holds exactly. A code becomes one by its bits: 0x6400 | code
is 1024 + code in float16. Eight codes of four bits are worked on as one word, and the head dimension stays in
the order in which they come out of it; queries and output are rearranged instead. Each thread unpacks its own
share of the keys, and the tensor cores read them from shared memory: a join of halves is not moved behind that.
"""

# ruff: noqa: ANN001, ANN202, RUF005 (kernels are typed by Triton, which unpacks no tuple within another)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from offload_triforce.kernels.attention_state import SplitAttention
from offload_triforce.kernels.launch import Launch, run
from offload_triforce.kernels.tiling import LARGEST_DIM, packed_tiling
from offload_triforce.kernels.types import AttentionParams, CodedChunks
from offload_triforce.kernels.verify_attention import _begin, _dot, _share, _soften, _tanh, interpreted, score_factors


def serves(dim: int) -> bool:
    """Whether chunks of this head dimension can be attended to without unpacking them first."""
    return dim % 16 == 0 and dim <= LARGEST_DIM


def attention_update(
    state: SplitAttention,
    packed: Tensor,
    coded: CodedChunks,
    params: AttentionParams,
    slots: int | None = None,
    tokens: Tensor | None = None,
) -> SplitAttention:
    """Take packed chunks into an attention, in place: those of the first ``slots``, or the first ``tokens``.

    Every query sees them, whatever the window. ``tokens`` (int64 [1]) is told by the device.
    """
    run(update_launch(state, packed, coded, params, slots, tokens))
    return state if state.started else state._replace(started=True)


def update_launch(
    state: SplitAttention,
    packed: Tensor,
    coded: CodedChunks,
    params: AttentionParams,
    slots: int | None,
    tokens: Tensor | None,
) -> Launch:
    """What ``attention_update`` launches: a program per block of rows, KV head and split."""
    heads, rows, dim = packed.shape
    if not serves(dim):
        raise ValueError(f"head dimensions are multiples of 16 up to {LARGEST_DIM} here, not {dim}")
    scaling, softcap = score_factors(params)
    keys = (coded.key_codes.shape[1] if slots is None else slots) * coded.chunk
    cut = packed_tiling(rows, dim, packed.element_size())
    run_of = min(8, coded.chunk & -coded.chunk)  # tokens of one chunk that a thread may unpack together
    arguments = (
        packed, *coded, tokens, *state[:3], scaling, softcap, rows, keys, packed.stride(0), packed.stride(1),
        coded.key_codes.stride(0), coded.key_low.stride(0), coded.value_low.stride(0),
        not state.started, coded.chunk, run_of, dim, cut.wide, cut.parts, cut.rows, cut.keys, coded.bits,
        packed.element_size() == 4, interpreted(),
    )  # fmt: skip
    grid = (-(-rows // cut.rows), heads, state.maximum.shape[0])
    return Launch(_update_kernel, grid, arguments, {"num_warps": cut.warps, "num_stages": cut.stages})


@triton.jit
def _pair(word, MASK: tl.constexpr, LESS: tl.constexpr, SINGLE: tl.constexpr):
    """The numbers under MASK in the low and in the high half of a word, minus LESS: exact in float16 below 1024."""
    bits = (word & MASK) | 0x64006400
    low = (bits & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True) - (1024.0 + LESS)
    high = (bits >> 16).to(tl.uint16).to(tl.float16, bitcast=True) - (1024.0 + LESS)
    if SINGLE:
        low, high = low.to(tl.float32), high.to(tl.float32)
    return low, high


@triton.jit
def _numbers(first, second, MASK: tl.constexpr, LESS: tl.constexpr, SINGLE: tl.constexpr):
    """Eight numbers of the words of the low and the high half of the dims: bytes 0, 2 of both, then 1, 3."""
    even = _pair(first, MASK, LESS, SINGLE) + _pair(second, MASK, LESS, SINGLE)
    return even + _pair(first >> 8, MASK, LESS, SINGLE) + _pair(second >> 8, MASK, LESS, SINGLE)


@triton.jit
def _codes(start, HALF: tl.constexpr, BITS: tl.constexpr, LESS: tl.constexpr, SINGLE: tl.constexpr):
    """Codes, minus LESS, in the words at ``start``."""
    first = tl.load(start)
    if BITS == 4:
        return _numbers(first, first >> 4, 0x000F000F, LESS, SINGLE)
    return _numbers(first, tl.load(start + HALF // 4), 0x00FF00FF, LESS, SINGLE)


@triton.jit
def _bytes(start, HALF: tl.constexpr, LESS: tl.constexpr, SINGLE: tl.constexpr):
    """Whole bytes, minus LESS, of a range per channel."""
    return _numbers(tl.load(start), tl.load(start + HALF // 4), 0x00FF00FF, LESS, SINGLE)


@triton.jit
def _joined(n, KEYS: tl.constexpr, WIDE: tl.constexpr):
    """[KEYS, WIDE] of eight [run, KEYS / run, WIDE / 8]: those of one word are neighbours."""
    low = tl.join(tl.join(n[0], n[4]), tl.join(n[2], n[6]))
    high = tl.join(tl.join(n[1], n[5]), tl.join(n[3], n[7]))
    return tl.reshape(tl.join(low, high), [KEYS, WIDE])


@triton.jit
def _rearranged(low, high, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """[ROWS, WIDE] in the order of ``_joined`` of the two halves of the dims, [ROWS, WIDE / 2] each."""
    both = tl.reshape(tl.join(low, high), [ROWS, WIDE // 8, 2, 2, 2])
    return tl.reshape(tl.permute(both, 0, 1, 3, 4, 2), [ROWS, WIDE])


@triton.jit
def _natural(both, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """The inverse of ``_rearranged``."""
    both = tl.permute(tl.reshape(both, [ROWS, WIDE // 8, 2, 2, 2]), 0, 1, 4, 2, 3)
    return tl.split(tl.reshape(both, [ROWS, WIDE // 2, 2]))


@triton.jit
def _query_range(query, floor, spread, exists, WIDE: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr):
    """Per row: the product with floor + 128 u, and the largest of the query's elements times u."""
    dims = tl.arange(0, WIDE // 2)
    offset = tl.zeros([ROWS], tl.float32)
    largest = tl.full([ROWS], 1e-30, tl.float32)
    for part in tl.static_range(2 * PARTS):
        place = part * (WIDE // 2) + dims
        q = tl.load(query + place[None, :], mask=exists, other=0.0).to(tl.float32)
        unit = tl.load(spread + place) / 255
        offset += tl.sum(q * (tl.load(floor + place) + 128 * unit)[None, :], 1)
        largest = tl.maximum(largest, tl.max(tl.abs(q * unit[None, :]), 1))
    return offset, largest


@triton.jit
def _queries(
    query, spread, largest, exists,
    DIM: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """The queries times u, as shares of the ``largest`` of their row: in reach of float16 whatever the model."""
    dims = tl.arange(0, WIDE // 2)
    parts = ()
    for part in tl.static_range(PARTS):
        halves = ()
        for half in tl.static_range(2):
            place = half * (DIM // 2) + part * (WIDE // 2) + dims
            q = tl.load(query + place[None, :], mask=exists, other=0.0).to(tl.float32)
            q = q * ((tl.load(spread + place) / 255)[None, :] / largest[:, None])
            halves = halves + (q if SINGLE else q.to(tl.float16),)
        parts = parts + (_rearranged(halves[0], halves[1], ROWS, WIDE),)
    return parts


@triton.jit(do_not_specialize=["rows", "keys"])
def _update_kernel(
    query, key_codes, value_codes, key_low, key_step, value_low, value_step, floor, spread, length,
    maximum, total, weighted, scaling, softcap, rows, keys, query_head, query_row, codes_head, range_head, token_head,
    FIRST: tl.constexpr, CHUNK: tl.constexpr, RUN: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BITS: tl.constexpr,
    SINGLE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One block of rows, one KV head, one split: see ``verify_attention``. SINGLE: arithmetic in float32."""
    HALF: tl.constexpr = DIM // 2
    WORDS: tl.constexpr = HALF * BITS // 16  # per token, of codes
    LEVELS: tl.constexpr = 2**BITS - 1
    CENTRE: tl.constexpr = 2 ** (BITS - 1)
    # Keys are multiplied with this: those of four bits become whole numbers; with 255, float16 would overflow.
    TIMES: tl.constexpr = 15 if BITS == 4 else 1
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exists = (row < rows)[:, None]
    stop = keys
    if length is not None:
        stop = tl.minimum(tl.load(length).to(tl.int32), keys)
    start, stop = _share(0, stop, BLOCK_KEYS)
    if not FIRST:  # noqa: SIM102 (one is known when the kernel is built, the other is not)
        if start >= stop:
            return

    query += head * query_head + row.to(tl.int64)[:, None] * query_row
    spread += head * DIM
    offset, largest = _query_range(query, floor + head * DIM, spread, exists, WIDE, PARTS, BLOCK_ROWS)
    tl.debug_barrier()  # else the compiler keeps all that was read, and spills it
    queries = _queries(query, spread, largest, exists, DIM, WIDE, PARTS, BLOCK_ROWS, SINGLE)
    offset *= scaling
    scale = largest * (scaling / TIMES)

    at = (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + head) * rows + row
    highest, mass = _begin(maximum, total, at, row < rows, FIRST, BLOCK_ROWS)
    cells = weighted + at[:, None] * DIM + tl.arange(0, WIDE // 2)[None, :]
    centres = tl.zeros([BLOCK_ROWS], tl.float32)
    sums = ()
    for part in tl.static_range(PARTS):
        if FIRST:
            sums = sums + (tl.zeros([BLOCK_ROWS, WIDE], tl.float32),)
        else:
            halves = (
                tl.load(cells + part * (WIDE // 2), mask=exists, other=0.0),
                tl.load(cells + HALF + part * (WIDE // 2), mask=exists, other=0.0),
            )
            sums = sums + (_rearranged(halves[0], halves[1], BLOCK_ROWS, WIDE),)

    key_codes = (key_codes + head * codes_head).to(tl.pointer_type(tl.uint32))
    value_codes = (value_codes + head * codes_head).to(tl.pointer_type(tl.uint32))
    key_low = (key_low + head * range_head).to(tl.pointer_type(tl.uint32))
    key_step = (key_step + head * range_head).to(tl.pointer_type(tl.uint32))
    value_low += head * token_head
    value_step += head * token_head
    word = tl.arange(0, WIDE // 8)
    for begin in range(start, stop, BLOCK_KEYS):
        # Keys in the order [place in a run, run]: so a thread has tokens of one chunk, and reads their range once.
        run_ = begin // RUN + tl.arange(0, BLOCK_KEYS // RUN)
        in_run = tl.arange(0, RUN)[:, None]
        column = tl.reshape(run_[None, :] * RUN + in_run, [BLOCK_KEYS])
        run_ = tl.minimum(run_, keys // RUN - 1)  # beyond the last there may be anything
        token = (run_[None, :] * RUN + in_run).to(tl.int64)
        words = token[:, :, None] * WORDS + word[None, None, :]
        ranges = (run_ // (CHUNK // RUN)).to(tl.int64)[:, None] * (DIM // 4) + word[None, :]
        scores = tl.zeros([BLOCK_ROWS, BLOCK_KEYS], tl.float32)
        for part in tl.static_range(PARTS):
            codes = _codes(key_codes + words + part * (WIDE // 8), HALF, BITS, 0, SINGLE)
            low = _bytes(key_low + ranges + part * (WIDE // 8), HALF, 128, SINGLE)
            step = _bytes(key_step + ranges + part * (WIDE // 8), HALF, 0, SINGLE)
            k = ()
            for i in tl.static_range(8):
                k = k + (codes[i] * (step[i] * (TIMES / LEVELS))[None, :, :] + (low[i] * TIMES)[None, :, :],)
            scores = _dot(queries[part], tl.trans(_joined(k, BLOCK_KEYS, WIDE)), scores, WIDEN)
        scores = scores * scale[:, None] + offset[:, None]
        if softcap is not None:
            scores = _tanh(scores) * softcap
        scores = tl.where((column < stop)[None, :], scores, float("-inf"))
        weights, decay, highest, mass = _soften(scores, highest, mass)
        token = tl.reshape(token, [BLOCK_KEYS])
        unit = tl.load(value_step + token).to(tl.float32)
        centre = tl.load(value_low + token).to(tl.float32) + CENTRE * unit
        centres = centres * decay + tl.sum(weights * centre[None, :], 1)
        weights = weights * unit[None, :]
        if not SINGLE:
            weights = weights.to(tl.float16)
        added = ()
        for part in tl.static_range(PARTS):
            v = _joined(_codes(value_codes + words + part * (WIDE // 8), HALF, BITS, CENTRE, SINGLE), BLOCK_KEYS, WIDE)
            added = added + (_dot(weights, v, sums[part] * decay[:, None], WIDEN),)
        sums = added

    tl.store(maximum + at, highest, mask=row < rows)
    tl.store(total + at, mass, mask=row < rows)
    for part in tl.static_range(PARTS):
        low, high = _natural(sums[part] + centres[:, None], BLOCK_ROWS, WIDE)
        tl.store(cells + part * (WIDE // 2), low, mask=exists)
        tl.store(cells + HALF + part * (WIDE // 2), high, mask=exists)
