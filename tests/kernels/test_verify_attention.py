"""The Triton attention kernels against their eager twin."""

from __future__ import annotations

import math

import pytest
import torch

from offload_triforce.kernels import ops, reference
from offload_triforce.kernels.reference import causal_mask, pack_queries
from offload_triforce.kernels.types import AttentionParams, TreeMask
from tests.usual import sampled

attention = pytest.importorskip("offload_triforce.kernels.verify_attention", reason="needs Triton")
states = pytest.importorskip("offload_triforce.kernels.attention_state", reason="needs Triton")

# (relative, absolute). Unlike their twin, the kernels round the softmax weights to the type of the values.
TOLERANCES = {torch.float32: (1e-5, 3e-6), torch.bfloat16: (2e-2, 1e-2), torch.float16: (2e-3, 1e-3)}


def draw(device, *shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def draw_tiles(device, kv_heads, sizes, dim, dtype=torch.float32):
    """Keys and values of tiles, [2, K, n, D] each: views into a buffer which is NaN wherever it is no tile's."""
    buffer = torch.full((2, kv_heads, sum(sizes) + 7 * len(sizes), dim), math.nan, dtype=dtype, device=device)
    tiles, start = [], 3
    for size in sizes:
        tile = buffer[:, :, start : start + size]
        tile.copy_(draw(device, 2, kv_heads, size, dim, dtype=dtype, seed=start))
        tiles.append(tile)
        start += size + 7
    return tiles


def assert_twins(query, steps, params, kv_heads, behind=None):
    """Run both over ``steps`` of (tile, newest); compare the log-sum-exp after each step, and the output.

    ``behind`` fills the twin's copy of a tile where the tile itself has NaN, which the kernel must not read.
    """
    packed = pack_queries(query, kv_heads)
    (buffer,) = states.state_buffers((), packed)
    state = states.attention_start((buffer.fill_(math.nan),), packed)
    twin = reference.attention_start(packed)
    for tile, tree_mask in steps:
        state = attention.attention_update(state, packed, *tile, params, tree_mask)
        clean = tile if behind is None else tile.nan_to_num(behind)
        twin = reference.attention_update(twin, packed, *clean, params, tree_mask)
        actual, expected = states.attention_logsumexp(state), reference.attention_logsumexp(twin)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    heads = query.shape[0]
    actual = states.attention_finish(state, heads, query.dtype)
    expected = reference.attention_finish(twin, heads, query.dtype)
    rtol, atol = TOLERANCES[query.dtype]
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)
    return actual


HEADS = [(1, 1, 1, 128), (3, 1, 5, 64), (1, 3, 13, 80), (3, 4, 1, 96), (1, 4, 5, 256), (1, 1, 123, 64)]


@pytest.mark.parametrize(
    ("dtype", "kv_heads", "groups", "tokens", "dim"), sampled([*TOLERANCES], HEADS, share=2), ids=str
)
def test_tiles_of_any_size(device, kv_heads, groups, tokens, dim, dtype):
    """Prefix tiles that all see, then the queries' own keys under a causal mask, then again a tile."""
    query = draw(device, kv_heads * groups, tokens, dim, dtype=dtype, seed=1)
    sizes = (123, 1, tokens + 2, 7)
    tree_mask = TreeMask(causal_mask(tokens, tokens + 2, device=device))
    steps = zip(draw_tiles(device, kv_heads, sizes, dim, dtype), (None, None, tree_mask, None), strict=True)
    assert_twins(query, steps, AttentionParams(dim**-0.5), kv_heads)


@pytest.mark.parametrize(
    ("tokens", "dim", "dtype"),
    [
        *((tokens, dim, torch.float16) for tokens, dim in ((260, 64), (130, 128), (40, 128), (140, 192), (70, 256))),
        *(
            (tokens, dim, torch.float16)
            for tokens, dim in ((50, 256), (33, 80), (70, 96), (20, 512), (35, 72), (9, 16))
        ),
        (70, 80, torch.float32),
        (20, 512, torch.float32),
    ],
)
def test_blocks_of_every_size(device, tokens, dim, dtype):
    """Whole steps of keys, a rest, and a mask; as the first update and as a later one."""
    query = draw(device, 1, tokens, dim, dtype=dtype, seed=1)
    tiles = draw_tiles(device, 1, (64, 21, tokens, 64), dim, dtype)
    tree_mask = TreeMask(causal_mask(tokens, tokens, device=device))
    assert_twins(query, zip(tiles, (None, None, tree_mask, None), strict=True), AttentionParams(dim**-0.5), 1)


def tree(device, tokens, masked, seed=0):
    """A mask under which every query sees itself and some others, in any order."""
    mask = torch.rand(tokens, masked, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask[:, -tokens:].fill_diagonal_(True)
    return mask.to(device)


@pytest.mark.parametrize(
    ("tokens", "masked", "keys", "params"),
    [
        (1, 1, 50, AttentionParams(0.1)),
        (5, 5, 5, AttentionParams(0.1, 2)),
        (5, 9, 123, AttentionParams(0.1, 30)),
        (5, 9, 123, AttentionParams(0.1, 3, 5.0)),
        (13, 40, 60, AttentionParams(0.1, 20)),
        (13, 40, 60, AttentionParams(0.1, None, 2.0)),
        (20, 20, 70, AttentionParams(0.1, 60, 50.0)),
    ],
)
def test_tree_masks_windows_and_softcaps(device, tokens, masked, keys, params):
    """Small windows hide whole blocks of keys, soft-caps change every score, and the mask may cover older keys too."""
    query = draw(device, 6, tokens, 64, seed=1)
    first, last = draw_tiles(device, 2, (30, keys), 64)
    assert_twins(query, [(first, None), (last, TreeMask(tree(device, tokens, masked)))], params, 2)


@pytest.mark.parametrize("window", [1, 4, 40])
@pytest.mark.parametrize("length", [None, 70])
def test_positions_in_a_tree(device, window, length):
    """Branches of a tree share positions, so that a window reaches equally far back from each."""
    tokens, end = 6, length or 90
    positions = torch.tensor([0, 1, 1, 2, 2, 1], device=device) + end - tokens
    length = None if length is None else torch.tensor([length], device=device)
    query = draw(device, 3, tokens, 64, seed=1)
    first, last = draw_tiles(device, 1, (40, 90), 64)
    mask = tree(device, tokens, tokens) | torch.eye(tokens, dtype=torch.bool, device=device)
    assert_twins(query, [(first, None), (last, TreeMask(mask, positions, length))], AttentionParams(0.125, window), 1)


def test_masks_of_any_strides(device):
    query = draw(device, 3, 5, 64, seed=1)
    first, last = draw_tiles(device, 1, (20, 40), 64)
    mask = tree(device, 5, 9)
    transposed = mask.t().contiguous().t()
    within = torch.zeros(11, 30, dtype=torch.bool, device=device)[::2, 3:21:2][:5].copy_(mask)
    expanded = torch.ones(1, 1, dtype=torch.bool, device=device).expand(5, 9)
    for each in (mask, transposed, within, expanded):
        assert_twins(query, [(first, None), (last, TreeMask(each))], AttentionParams(0.125), 1)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("length", [0, 3, 5, 64, 123, *(pytest.param(n, marks=pytest.mark.slow) for n in (70, 122))])
def test_what_lies_behind_the_length_is_not_read(device, length, window):
    """A buffer of 123 keys with NaN behind ``length``. Where the mask is longer, its first columns are of no use."""
    query = draw(device, 3, 5, 64, seed=1)
    first, last = draw_tiles(device, 1, (20, 123), 64)
    last[:, :, length:] = math.nan
    tree_mask = TreeMask(causal_mask(5, 5, device=device), None, torch.tensor([length], device=device))
    for steps in ([(first, None), (last, tree_mask)], [(last, tree_mask), (first, None)]):
        assert_twins(query, steps, AttentionParams(0.125, window), 1, behind=0.0)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
def test_scores_of_any_size_neither_overflow_nor_vanish(device, order):
    """exp(300) is infinite in float32: each tile has to be weighed against the largest score so far."""
    query = torch.ones(1, 3, 64, device=device)
    tiles = draw_tiles(device, 1, (40, 50, 40), 64)
    for tile, middle in zip(tiles, (-280, 0, 280), strict=True):
        tile[0] = torch.linspace(middle - 20, middle + 20, tile.shape[2], device=device).round()[:, None] / 64
    assert_twins(query, [(tiles[which], None) for which in order], AttentionParams(1.0), 1)


def test_queries_that_see_nothing(device):
    """Not in one tile, first or later; and never: then zeros, and no mass."""
    query = draw(device, 2, 4, 64, seed=1)
    some = torch.tensor([True, False, True, False], device=device)[:, None].expand(4, 9)
    tiles = draw_tiles(device, 1, (9, 9, 9), 64)
    everything = [(tiles[0], TreeMask(some)), (tiles[1], TreeMask(~some)), (tiles[2], TreeMask(some))]
    assert_twins(query, everything, AttentionParams(0.125), 1)
    packed = pack_queries(query, 1)
    state = states.attention_start(states.state_buffers((), packed), packed)
    assert states.attention_logsumexp(state).isneginf().all()
    assert not states.attention_finish(state, 2, torch.float32).any()
    for tile in tiles:
        state = attention.attention_update(state, packed, *tile, AttentionParams(0.125), TreeMask(some))
    seen = states.attention_logsumexp(state).view(2, 4)
    output = states.attention_finish(state, 2, torch.float32)
    assert seen[:, [1, 3]].isneginf().all()
    assert not output[:, [1, 3]].any()
    assert seen[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize("splits", [1, 4, 32])
def test_any_number_of_splits(device, splits, monkeypatch):
    """Most of 32 splits get no keys at all."""
    monkeypatch.setattr(states, "split_count", lambda *_: splits)
    monkeypatch.setattr(states, "state_layout", states.state_layout.__wrapped__)
    query = draw(device, 6, 5, 80, seed=1)
    tiles = draw_tiles(device, 2, (1, 260, 7, 40), 80)
    tree_mask = (None, None, TreeMask(causal_mask(5, 5, device=device)), None)
    assert_twins(query, zip(tiles, tree_mask, strict=True), AttentionParams(0.1), 2)


def test_one_buffer_serves_all_smaller_blocks(device):
    """A pass allocates nothing: the room of its largest block does for the others, which do not see what is in it."""
    large, small = draw(device, 6, 40, 64, seed=1), draw(device, 6, 3, 64, seed=2)
    buffers = states.state_buffers((), pack_queries(large, 2))
    (tile,) = draw_tiles(device, 2, (50,), 64)
    for query in (large, small, large):
        packed = pack_queries(query, 2)
        assert states.state_buffers(buffers, packed) is buffers
        state = states.attention_start(buffers, packed)
        state = attention.attention_update(state, packed, *tile, AttentionParams(0.125))
        twin = reference.attention_update(reference.attention_start(packed), packed, *tile, AttentionParams(0.125))
        actual, expected = (m.attention_finish(s, 6, torch.float32) for m, s in ((states, state), (reference, twin)))
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=3e-6)
    larger = pack_queries(draw(device, 6, 400, 64), 2)
    assert states.state_buffers(buffers, larger)[0].numel() > buffers[0].numel()


@pytest.mark.parametrize("far", ["heads", "tokens", "rows", "mask"])
def test_offsets_pass_two_to_the_31(device, arena, far):
    """Each stride fits 32 bits, but a few steps of it do not."""
    heads, tokens, step = 5, 5, 1 << 29
    key, value = draw(device, 2, heads, tokens, 64, dtype=torch.float16)
    if far in ("heads", "tokens"):
        strides = (step, 64, 1) if far == "heads" else (320, step, 1)
        key, value = arena(key, strides), arena(value, strides)
    query = draw(device, heads, tokens, 64, dtype=torch.float16, seed=2)
    if far == "rows":
        query = arena(query, (320, step, 1))
    mask = tree(device, tokens, tokens)
    if far == "mask":
        mask = arena(mask, (step, 1))
    assert_twins(query, [((key, value), TreeMask(mask))], AttentionParams(0.125), heads)


def test_elements_that_are_not_neighbours_are_refused(device):
    query, params = draw(device, 2, 3, 64), AttentionParams(0.125)
    key = draw(device, 2, 64, 9).mT
    with pytest.raises(ValueError, match="neighbours"):
        states.attention_start((), query.mT.contiguous().mT)
    state = states.attention_start(states.state_buffers((), query), query)
    for pair in ((key, key.contiguous()), (key.contiguous(), key)):
        with pytest.raises(ValueError, match="neighbours"):
            attention.attention_update(state, query, *pair, params)


def test_running_attention_uses_the_kernels(device, monkeypatch):
    """One object for layer after layer, on the CPU too if asked: own tokens, then tiles of two sizes, and unaligned."""
    monkeypatch.setenv("OFFLOAD_TRIFORCE_KERNELS", "triton")
    running = ops.RunningAttention()
    params, tree_mask = AttentionParams(0.125, 20, 9.0), TreeMask(causal_mask(5, 5, device=device))
    first, *tiles = draw_tiles(device, 2, (40, 64, 64, 30, 64), 64)
    for layer, dtype in enumerate((torch.float32, torch.float32, torch.float16)):
        query = draw(device, 6, 5, 64, dtype=dtype, seed=layer)
        running.start(query, 2, params)
        running.update(*first.to(dtype), tree_mask)
        for tile in tiles:
            running.update(*tile.to(dtype))
        assert isinstance(running._state, states.SplitAttention)
        twin = reference.attention_start(running.packed)
        twin = reference.attention_update(twin, running.packed, *first.to(dtype), params, tree_mask)
        for tile in tiles:
            twin = reference.attention_update(twin, running.packed, *tile.to(dtype), params)
        torch.testing.assert_close(running.logsumexp(), reference.attention_logsumexp(twin), rtol=1e-5, atol=1e-5)
        expected = reference.attention_finish(twin, 6, dtype)
        rtol, atol = TOLERANCES[dtype]
        torch.testing.assert_close(running.finish(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("way", ["triton", "torch"])
def test_the_same_memory_with_other_tiles_in_it(device, monkeypatch, way):
    """As decoded tiles come in, of layer after layer, and others between them."""
    monkeypatch.setenv("OFFLOAD_TRIFORCE_KERNELS", way)
    running, params = ops.RunningAttention(), AttentionParams(0.125)
    first, *tiles = (tile.contiguous() for tile in draw_tiles(device, 2, (40, 64, 64, 64, 64, 64), 64))
    buffer = torch.empty_like(tiles[0])
    for layer in range(2):
        query = draw(device, 6, 5, 64, seed=layer)
        running.start(query, 2, params)
        if layer == 0:  # in the other one, the buffer is what comes first
            running.update(*first)
        for number, tile in enumerate(tiles):
            if number == 2:
                running.update_tile(tiles[0])
            elif number == 4:
                running.update(*tiles[1])
            running.update_tile(buffer.copy_(tile))
        twin = reference.attention_start(running.packed)
        for tile in [*[first][layer:], *tiles, *tiles[:2]]:
            twin = reference.attention_update(twin, running.packed, *tile, params)
        expected = reference.attention_finish(twin, 6, torch.float32)
        torch.testing.assert_close(running.finish(), expected, rtol=1e-4, atol=1e-5)


def test_head_dimensions_without_a_kernel_go_to_the_twin(device, monkeypatch):
    monkeypatch.setenv("OFFLOAD_TRIFORCE_KERNELS", "triton")
    running, (tile,) = ops.RunningAttention(), draw_tiles(device, 1, (6,), 520)
    query = draw(device, 2, 3, 520, seed=1)
    running.start(query, 1, AttentionParams(0.05))
    running.update(*tile)
    expected = (query[None] @ tile[0].mT * 0.05).softmax(-1) @ tile[1]
    torch.testing.assert_close(running.finish(), expected[0], rtol=1e-4, atol=1e-5)
