"""Attention of a block of queries over keys that stream by, in Triton: the twin of ``reference.attention_update``.

Only what all of Ampere, Ada, Hopper and Blackwell have is used, and no block takes more than the 99 KB of shared memory
that RTX cards give it. Offsets are int64 throughout: indices are widened before a stride multiplies them.
"""

# ruff: noqa: ANN001, ANN202, RUF005 (kernels are typed by Triton, which unpacks no tuple within another)

from __future__ import annotations

import math
import weakref
from collections.abc import Hashable

import triton
import triton.language as tl
from torch import Tensor

from offload_triforce.kernels.attention_state import LOWEST, SplitAttention
from offload_triforce.kernels.launch import Bound, Launch, aligned, run
from offload_triforce.kernels.tiling import LARGEST_DIM, tiling
from offload_triforce.kernels.types import AttentionParams, TreeMask

LOG2_E = math.log2(math.e)


def serves(dim: int) -> bool:
    """Whether the kernel takes this head dimension."""
    return dim <= LARGEST_DIM


def attention_update(
    state: SplitAttention,
    packed: Tensor,
    key: Tensor,
    value: Tensor,
    params: AttentionParams,
    tree_mask: TreeMask | None = None,
) -> SplitAttention:
    """Take the keys and values of one tile in, [K, n, D] each, in place. Only D has to be contiguous."""
    run(update_launch(state, packed, key, value, params, tree_mask))
    return state if state.started else state._replace(started=True)


class TileUpdates:
    """``attention_update`` for tile after tile that all queries see, with everything but pointers bound beforehand."""

    def __init__(self) -> None:
        self._bound: dict[Hashable, dict[Hashable, Bound]] = {}
        self._last: tuple[weakref.ref[Tensor], Bound] | None = None  # the tile that was taken in last, and how

    def start(self, state: SplitAttention, packed: Tensor, params: AttentionParams) -> None:
        """Another block of queries: usually that of the next layer, with the same shapes on the same memory."""
        self._packed, self._params, self._state = packed, params, state._replace(started=True)
        self._last = None
        # All that such a tile takes from the parameters are the factors; sinks, say, differ between layers.
        factors = score_factors(params)
        shape = (packed.shape, packed.stride(), packed.dtype, packed.device, factors, state.weighted.data_ptr())
        self._of_shape = self._bound.setdefault(shape, {})
        self._aligned = aligned(packed)

    def update_tile(self, kv: Tensor) -> None:
        """``update`` with a tile, [2, K, n, D]. The same tensor again, as decoded tiles come in, is not looked at."""
        if self._last is not None and self._last[0]() is kv:
            self._last[1].again()
            return
        bound = self.update(kv[0], kv[1])
        self._last = None if bound is None else (weakref.ref(kv), bound)  # whose memory must not stay for this

    def update(self, key: Tensor, value: Tensor) -> Bound | None:
        """Take keys and values in, [K, n, D] each; they are not the first. Returns what can be launched again."""
        self._last = None
        which = (key.shape[1], key.stride(), value.stride(), key.dtype)
        usual = self._aligned and aligned(key, value)
        bound = self._of_shape.get(which) if usual else None
        if bound is not None:
            bound(self._packed, key, value)
            return bound
        launch = update_launch(self._state, self._packed, key, value, self._params, None)
        if not usual:
            run(launch)
            return None
        bound = self._of_shape[which] = Bound(launch, ("query", "key", "value"))
        return bound


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels. Its dot takes the bits of a bfloat16 for an integer."""
    return not isinstance(_update_kernel, triton.JITFunction)


def score_factors(params: AttentionParams) -> tuple[float, float | None]:
    """What a product of query and key is multiplied with, and then its capped tangent, for units of log 2."""
    if params.softcap is None:
        return params.scaling * LOG2_E, None
    return params.scaling / params.softcap, params.softcap * LOG2_E


def update_launch(
    state: SplitAttention,
    packed: Tensor,
    key: Tensor,
    value: Tensor,
    params: AttentionParams,
    tree_mask: TreeMask | None,
) -> Launch:
    """What ``attention_update`` launches: a program per block of rows, KV head and split."""
    if key.stride(2) != 1 or value.stride(2) != 1:
        raise ValueError("the elements of a key, and of a value, must be neighbours in memory")
    (heads, rows, dim), keys = packed.shape, key.shape[1]
    scaling, softcap = score_factors(params)
    window = params.window
    if tree_mask is None:
        window = mask = positions = length = None
        tokens = masked = mask_row = mask_column = 0
    else:
        mask, positions, length = tree_mask
        (tokens, masked), (mask_row, mask_column) = mask.shape, mask.stride()
        if window is None:
            positions = None
    itemsize = key.element_size()
    even = tree_mask is None and keys % tiling(rows, dim, itemsize).keys == 0
    cut = tiling(rows, dim, itemsize, even)
    arguments = (
        packed, key, value, mask, positions, length, *state[:3],
        scaling, softcap, window, rows, keys, tokens, masked,
        packed.stride(0), packed.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        mask_row, mask_column, not state.started, dim, cut.wide, cut.parts, cut.rows, cut.keys, even, interpreted(),
    )  # fmt: skip
    grid = (-(-rows // cut.rows), heads, state.maximum.shape[0])
    return Launch(_update_kernel, grid, arguments, {"num_warps": cut.warps, "num_stages": cut.stages})


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
def _load_parts(
    start, exists, DIM: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    """Rows that begin at ``start`` [N, 1], part by part of the head dimension: PARTS of [N, WIDE].

    EVEN: all rows exist.
    """
    dims = tl.arange(0, WIDE)[None, :]
    parts = ()
    for part in tl.static_range(PARTS):
        if EVEN and WIDE * PARTS == DIM:
            loaded = tl.load(start + part * WIDE + dims)
        elif EVEN:
            loaded = tl.load(start + part * WIDE + dims, mask=part * WIDE + dims < DIM, other=0.0)
        else:
            loaded = tl.load(start + part * WIDE + dims, mask=exists & (part * WIDE + dims < DIM), other=0.0)
        parts = parts + (loaded,)
    return parts


@triton.jit
def _store_parts(start, parts, exists, DIM: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr):
    dims = tl.arange(0, WIDE)[None, :]
    for part in tl.static_range(PARTS):
        tl.store(start + part * WIDE + dims, parts[part], mask=exists & (part * WIDE + dims < DIM))


@triton.jit
def _begin(maximum, total, at, exists, FIRST: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Largest score and mass of each row so far; nothing before the FIRST update."""
    if FIRST:
        return tl.full([BLOCK_ROWS], LOWEST, tl.float32), tl.zeros([BLOCK_ROWS], tl.float32)
    return tl.load(maximum + at, mask=exists, other=LOWEST), tl.load(total + at, mask=exists, other=0.0)


@triton.jit
def _soften(scores, highest, mass):
    """A step of the running softmax over new scores, in powers of two.

    Returns their weights, by how much what was summed so far decays, and the new largest score and mass of each row.
    """
    higher = tl.maximum(highest, tl.max(scores, 1))
    weights = tl.exp2(scores - higher[:, None])
    decay = tl.exp2(highest - higher)
    return weights, decay, higher, mass * decay + tl.sum(weights, 1)


@triton.jit
def _share(first, stop, BLOCK_KEYS: tl.constexpr):
    """Which of the keys from ``first`` on this split takes: a whole number of steps, but for the last."""
    steps = tl.cdiv(tl.maximum(stop - first, 0), BLOCK_KEYS)
    part = tl.cdiv(steps, tl.num_programs(2)) * BLOCK_KEYS
    start = first + tl.program_id(2) * part
    return start, tl.minimum(start + part, stop)


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
    FIRST: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, EVEN: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One block of rows, one KV head, one split: its part of the tile into its running softmax.

    EVEN: no mask, and a whole number of steps.
    """
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exists = row < rows

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
    start, stop = _share(first, stop, BLOCK_KEYS)
    if not FIRST:  # noqa: SIM102 (one is known when the kernel is built, the other is not)
        if start >= stop:
            return

    at = (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + head) * rows + row
    highest, mass = _begin(maximum, total, at, exists, FIRST, BLOCK_ROWS)
    if FIRST:
        sums = ()
        for _ in tl.static_range(PARTS):
            sums = sums + (tl.zeros([BLOCK_ROWS, WIDE], tl.float32),)
    else:
        sums = _load_parts(weighted + at[:, None] * DIM, exists[:, None], DIM, WIDE, PARTS, False)
    rows_start = query + head * query_head + row.to(tl.int64)[:, None] * query_row
    queries = _load_parts(rows_start, exists[:, None], DIM, WIDE, PARTS, False)

    for begin in range(start, stop, BLOCK_KEYS):
        column = begin + tl.arange(0, BLOCK_KEYS)
        wide = column.to(tl.int64)[:, None]
        there = (column < stop)[:, None]
        k = _load_parts(key + head * key_head + wide * key_column, there, DIM, WIDE, PARTS, EVEN)
        v = _load_parts(value + head * value_head + wide * value_column, there, DIM, WIDE, PARTS, EVEN)
        scores = tl.zeros([BLOCK_ROWS, BLOCK_KEYS], tl.float32)
        for part in tl.static_range(PARTS):
            scores = _dot(queries[part], tl.trans(k[part]), scores, WIDEN)
        scores = scores * scaling
        if softcap is not None:
            scores = _tanh(scores) * softcap
        if not EVEN:
            scores = tl.where((column < stop)[None, :], scores, float("-inf"))
        if mask is not None:
            scores = _visible(scores, column, place, token, end, mask, window, masked, mask_row, mask_column)
        weights, decay, highest, mass = _soften(scores, highest, mass)
        weights = weights.to(v[0].dtype)
        added = ()
        for part in tl.static_range(PARTS):
            added = added + (_dot(weights, v[part], sums[part] * decay[:, None], WIDEN),)
        sums = added

    tl.store(maximum + at, highest, mask=exists)
    tl.store(total + at, mass, mask=exists)
    _store_parts(weighted + at[:, None] * DIM, sums, exists[:, None], DIM, WIDE, PARTS)
