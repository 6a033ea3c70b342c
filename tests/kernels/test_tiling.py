"""How the attention kernels cut their work: arithmetic alone."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_triforce.kernels import tiling

DIMS = st.one_of(st.sampled_from([64, 80, 96, 128, 192, 256, 512]), st.integers(1, 512))


def power(number):
    return number > 0 and number & (number - 1) == 0


@given(st.integers(1, 5000), DIMS, st.sampled_from([2, 4]), st.booleans())
def test_parts_make_up_the_head_dimension(rows, dim, itemsize, plain):
    cut = tiling.tiling(rows, dim, itemsize, plain)
    assert all(map(power, (cut.rows, cut.keys, cut.wide, cut.warps)))
    assert min(cut.rows, cut.keys, cut.wide) >= 16, "what a matrix instruction takes"
    assert (cut.parts - 1) * cut.wide < dim <= cut.parts * cut.wide
    assert cut.rows < 2 * max(16, rows), "no block is idle for the most part"
    assert not plain or itemsize == 4 or tiling.tiling(rows, dim, itemsize, False).keys <= cut.keys


@given(st.integers(1, 5000), st.sampled_from([64, 80, 96, 128, 192, 256]))
def test_rows_stay_within_a_warp(rows, dim):
    """Sixteen rows for each warp, and no part wider than the block has rows, by which Triton cuts it that way."""
    cut = tiling.tiling(rows, dim, 2)
    if rows > 64 or (rows > 32 and dim <= 128):
        assert cut.rows == 16 * cut.warps >= cut.wide
        assert cut.parts * cut.wide == dim, "nothing is padded"
    padded = cut.rows * -(-rows // cut.rows)
    assert dim > 128 or rows <= 32 or padded == 64 * -(-rows // 64)


@given(st.integers(1, 5000), st.integers(1, 32), st.sampled_from([2, 4]))
def test_packed_chunks(rows, sixteenths, itemsize):
    dim = 16 * sixteenths
    cut = tiling.packed_tiling(rows, dim, itemsize)
    assert all(map(power, (cut.rows, cut.keys, cut.wide)))
    assert cut.parts * cut.wide == dim
    assert min(cut.rows, cut.keys, cut.wide) >= 16, "and so the 8 tokens of a run fit into a step"


@given(st.integers(1, 64), st.integers(1, 4000), st.sampled_from([64, 128, 256]), st.sampled_from([28, 82, 128, 170]))
def test_splits(heads, rows, dim, multiprocessors):
    """The best of all numbers of splits that the state has room for."""
    splits = tiling.best_splits(heads, rows, dim, 2, multiprocessors)
    size = 4 * heads * rows * dim
    assert 1 <= splits <= tiling.MOST_SPLITS
    assert splits == 1 or splits * size <= tiling.MOST_STATE
    cut = tiling.tiling(rows, dim, 2)
    blocks, room = heads * math.ceil(rows / cut.rows), multiprocessors * cut.resident
    steps = max(1, tiling.TILE_BYTES // (4 * heads * dim * cut.keys))
    taken = tiling.wave_time(blocks, room, steps, splits)
    for other in range(1, min(steps, tiling.MOST_SPLITS) + 1):
        if other * size <= tiling.MOST_STATE:
            assert taken <= tiling.wave_time(blocks, room, steps, other)


@pytest.mark.parametrize(("heads", "groups"), [(32, 1), (8, 4), (4, 7)])
@pytest.mark.parametrize("tokens", [13, 49, 193, 512])
def test_a_4090_is_busy(heads, groups, tokens):
    """Of what it could do meanwhile, the blocks of a tile leave little. Llama-2-7B, Llama-3.1-8B and Qwen2.5-7B."""
    rows = groups * tokens
    cut, splits = tiling.tiling(rows, 128, 2), tiling.best_splits(heads, rows, 128, 2, 128)
    blocks, room = heads * math.ceil(rows / cut.rows), 128 * cut.resident
    steps = tiling.TILE_BYTES // (4 * heads * 128 * cut.keys)
    busy = blocks * (steps + splits) / (room * tiling.wave_time(blocks, room, steps, splits))
    assert busy > 0.8, (cut, splits, busy)
