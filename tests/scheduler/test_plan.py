"""The plan: no tile twice, none forgotten, and the bytes that it promises."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_triforce.scheduler.plan import RING_LIMIT, TilePlan, choose_ring, choose_tile

plans = st.builds(
    TilePlan,
    layers=st.integers(1, 9),
    kv_heads=st.integers(1, 8),
    head_dim=st.sampled_from([64, 80, 96, 128, 256]),
    itemsize=st.sampled_from([1, 2, 4]),
    tile_tokens=st.integers(1, 4096),
    tiles=st.integers(0, 40),
    ring=st.integers(1, 6),
    resident=st.floats(0, 1),
)


def all_tiles(plan, tiles):
    return list(itertools.product(range(plan.layers), range(tiles)))


@given(plans, st.data())
def test_every_tile_is_resident_or_streamed_once_and_in_order(plan, data):
    tiles = data.draw(st.integers(0, plan.tiles))
    streamed = list(plan.stream_order(tiles))
    resident = [key for key in plan.resident_tiles() if key[1] < tiles]
    assert streamed == sorted(streamed)
    assert resident == sorted(resident)
    assert sorted(streamed + resident) == all_tiles(plan, tiles)
    assert resident == [key for key in all_tiles(plan, tiles) if plan.is_resident(*key)]


@given(plans)
def test_resident_share(plan):
    """As many as fit into the share, and not one more: the share is a promise about device memory."""
    total = plan.layers * plan.tiles
    assert len(plan.resident_tiles()) == int(total * plan.resident)


@given(plans)
def test_resident_tiles_are_spread_evenly(plan):
    """Of every stretch of a pass the share is resident, so that the ring refills all along."""
    flags = [plan.is_resident(*key) for key in all_tiles(plan, plan.tiles)]
    for count, so_far in enumerate(itertools.accumulate(flags), start=1):
        assert abs(so_far - Fraction(plan.resident) * count) <= 1


@pytest.mark.parametrize(("resident", "expected"), [(0.0, 0), (0.3, 6), (0.5, 10), (1.0, 20)])
def test_resident_count(resident, expected):
    plan = TilePlan(4, 2, 64, 2, 128, tiles=5, ring=2, resident=resident)
    assert len(plan.resident_tiles()) == expected
    assert len(list(plan.stream_order(5))) == 20 - expected


@given(plans)
def test_bytes_add_up(plan):
    element_count = 2 * plan.layers * plan.tiles * plan.tile_tokens * plan.kv_heads * plan.head_dim
    assert plan.host_bytes + plan.resident_bytes == element_count * plan.itemsize
    assert plan.host_bytes == plan.streamed_bytes(plan.tiles)
    assert plan.ring_bytes == plan.ring * plan.tile_bytes
    assert plan.tile_bytes == plan.token_bytes * plan.tile_tokens


def test_bytes_of_llama_2_7b_at_128k():
    """The figure of the paper: 68.7 GB, more than any consumer card holds."""
    plan = TilePlan(layers=32, kv_heads=32, head_dim=128, itemsize=2, tile_tokens=1024, tiles=128, ring=4)
    assert plan.host_bytes == 2 * 32 * 32 * 128 * 2 * 131072 == 68_719_476_736
    assert plan.resident_bytes == 0
    assert plan.ring_bytes == 4 * 16_777_216


@given(st.integers(1, 10**6), st.integers(2, 2**21), st.sampled_from([1, 3, 8, 24, 32]))
def test_chosen_tile(token_bytes, context, multiple):
    """A multiple of the chunk; never more than 16 MB, unless a single multiple is."""
    tile = choose_tile(token_bytes, context, multiple)
    assert tile % multiple == 0
    assert tile >= multiple
    assert tile * token_bytes <= 16 << 20 or tile == multiple
    assert tile * 4 <= context or tile == multiple


@given(st.integers(1, 10**9))
def test_chosen_ring(tile_bytes):
    ring = choose_ring(tile_bytes)
    assert 1 <= ring <= 64
    assert ring * tile_bytes <= RING_LIMIT or ring == 1


@pytest.mark.parametrize(
    ("kv_heads", "tile", "ring"),
    [(32, 1024, 8), (8, 4096, 8), (4, 8192, 8)],
    ids=["Llama-2-7B", "Llama-3.1-8B", "Qwen2.5-7B"],
)
def test_choices_for_well_known_shapes(kv_heads, tile, ring):
    """bf16, head dimension 128: 16 MB tiles, 128 MB of ring."""
    token_bytes = 2 * kv_heads * 128 * 2
    assert choose_tile(token_bytes, 131072, 8) == tile
    assert choose_ring(tile * token_bytes) == ring
    assert choose_ring(tile * token_bytes, 20e-3 * 16e9) == 20, "320 MB arrive at 16 GB/s while a step takes 20 ms"
    assert choose_ring(tile * token_bytes, 1e9) == 32, "the limit"
