"""The eager twins against float64 formulas written the plain way, KV heads repeated and all."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_triforce.kernels import reference as ops
from offload_triforce.kernels.types import AttentionParams, ChunkSelection, TreeMask

# (relative, absolute): online attention accumulates in float32 and rounds once, to the output's type.
ONLINE = {torch.float32: (1e-6, 3e-6), torch.bfloat16: (8e-3, 1e-5), torch.float16: (1e-3, 1e-5)}
# torch's fused kernels also round the softmax weights to the input's type.
FUSED = {torch.float32: (1e-5, 3e-6), torch.bfloat16: (2e-2, 1e-2), torch.float16: (2e-3, 1e-3)}

DTYPES = pytest.mark.parametrize("dtype", ONLINE, ids=lambda dtype: str(dtype).removeprefix("torch."))


def dense_attention(query, key, value, scaling, window=None, softcap=None):
    """Softmax attention in float64 of the last T of n tokens: [H, T, D]. The reference of this file."""
    tokens, total = query.shape[1], key.shape[1]
    groups = query.shape[0] // key.shape[0]
    key, value = (x.double().repeat_interleave(groups, dim=0) for x in (key, value))
    scores = query.double() @ key.mT * scaling
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    for row in range(tokens):
        position = total - tokens + row
        scores[:, row, position + 1 :] = -math.inf
        if window is not None:
            scores[:, row, : max(0, position - window + 1)] = -math.inf
    return scores.softmax(dim=-1) @ value


def tiled_attention(query, key, value, scaling, tile, window=None):
    """The same through ``attention_update``, a tile at a time."""
    packed = ops.pack_queries(query, key.shape[0])
    mask = ops.causal_mask(query.shape[1], key.shape[1], window)
    state = ops.attention_start(packed)
    for start in range(0, key.shape[1], tile):
        part = slice(start, start + tile)
        tree_mask = TreeMask(mask[:, part])
        state = ops.attention_update(state, packed, key[:, part], value[:, part], AttentionParams(scaling), tree_mask)
    return ops.attention_finish(state, query.shape[0], query.dtype)


def draw(kv_heads, groups, tokens, total, dim, dtype=torch.float32, seed=0):
    """Query [H, T, D], key and value [K, n, D]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((kv_heads * groups, tokens), (kv_heads, total), (kv_heads, total))
    return [torch.randn(*shape, dim, generator=generator).to(dtype) for shape in shapes]


def assert_near(actual, expected, dtype, tolerances=ONLINE):
    rtol, atol = tolerances[dtype]
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=atol)


@DTYPES
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("groups", [1, 3, 4, 7])
def test_online_attention_is_softmax_attention(groups, dim, dtype):
    query, key, value = draw(2, groups, 5, 123, dim, dtype)
    expected = dense_attention(query, key, value, dim**-0.5)
    assert_near(tiled_attention(query, key, value, dim**-0.5, tile=37), expected, dtype)


@pytest.mark.parametrize("window", [None, 1, 4, 30, 500])
@pytest.mark.parametrize(("tokens", "total", "tile"), [(1, 1, 1), (1, 123, 123), (5, 123, 1), (37, 37, 5), (5, 37, 8)])
def test_masks_hold_across_tiles(tokens, total, tile, window):
    """Includes tiles that a window hides from every query, before and after the first visible key."""
    query, key, value = draw(2, 3, tokens, total, 64)
    expected = dense_attention(query, key, value, 0.125, window)
    assert_near(tiled_attention(query, key, value, 0.125, tile, window), expected, torch.float32)


@given(
    st.integers(1, 3), st.integers(1, 7), st.integers(1, 9), st.integers(0, 60), st.integers(1, 70),
    st.none() | st.integers(1, 70), st.integers(0, 99),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_any_shape_and_tile_size(kv_heads, groups, tokens, before, tile, window, seed):
    query, key, value = draw(kv_heads, groups, tokens, before + tokens, 16, seed=seed)
    expected = dense_attention(query, key, value, 0.25, window)
    assert_near(tiled_attention(query, key, value, 0.25, tile, window), expected, torch.float32)


@pytest.mark.parametrize("order", [1, -1])
def test_scores_of_any_size_neither_overflow_nor_vanish(order):
    """exp(300) is infinite in float32: each tile has to be weighed against the largest score so far."""
    query, key, value = torch.ones(1, 1, 4), torch.empty(1, 60, 4), torch.randn(1, 60, 4)
    key[:] = torch.linspace(-300, 300, 60)[:, None] * order / 4
    packed = ops.pack_queries(query, 1)
    state = ops.attention_start(packed)
    for start in range(0, 60, 7):
        part = slice(start, start + 7)
        state = ops.attention_update(state, packed, key[:, part], value[:, part], AttentionParams(1.0))
    expected = (query.double() @ key.double().mT).softmax(-1) @ value.double()
    assert_near(ops.attention_finish(state, 1, torch.float32), expected, torch.float32)


def test_state_holds_log_sum_exp():
    """``maximum`` and ``total`` are what the retrieval baseline is made of."""
    query, key, value = draw(2, 3, 5, 37, 16)
    packed = ops.pack_queries(query, 2)
    state = ops.attention_update(ops.attention_start(packed), packed, key[:, :20], value[:, :20], AttentionParams(0.25))
    state = ops.attention_update(state, packed, key[:, 20:], value[:, 20:], AttentionParams(0.25))
    scores = packed.double() @ key.double().mT * 0.25
    torch.testing.assert_close(state.maximum, scores.amax(-1).float())
    torch.testing.assert_close(ops.attention_logsumexp(state), scores.logsumexp(-1).float())


def test_packed_rows_are_grouped_by_kv_head():
    kv_heads, groups, tokens, dim = 2, 3, 5, 4
    query = draw(kv_heads, groups, tokens, 1, dim)[0]
    packed = ops.pack_queries(query, kv_heads)
    assert packed.shape == (kv_heads, groups * tokens, dim)
    for head in range(kv_heads * groups):
        for token in range(tokens):
            row = packed[head // groups, head % groups * tokens + token]
            assert torch.equal(row, query[head, token])


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize(("tokens", "total"), [(1, 1), (1, 9), (4, 9), (9, 9)])
def test_causal_mask(tokens, total, window):
    mask = ops.causal_mask(tokens, total, window)
    for row in range(tokens):
        position = total - tokens + row
        seen = [j for j in range(total) if j <= position and (window is None or j > position - window)]
        assert mask[row].nonzero().flatten().tolist() == seen


@DTYPES
@pytest.mark.parametrize("window", [None, 1, 16, 200])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("tokens", "total"), [(1, 1), (1, 123), (5, 123), (37, 37), (37, 40)])
def test_prefill_attention(tokens, total, groups, window, dtype):
    query, key, value = draw(2, groups, tokens, total, 80, dtype)
    expected = dense_attention(query, key, value, 0.1, window)
    assert_near(ops.prefill_attention(query, key, value, AttentionParams(0.1, window)), expected, dtype, FUSED)


@pytest.mark.parametrize("window", [None, 7, 1500])
def test_prefill_attention_with_softcap(window):
    """More keys than go through at once."""
    query, key, value = draw(2, 3, 5, 2100, 16)
    expected = dense_attention(query, key, value, 0.5, window, softcap=1.5)
    assert_near(ops.prefill_attention(query, key, value, AttentionParams(0.5, window, 1.5)), expected, torch.float32)


@pytest.mark.parametrize("window", [None, 1, 6, 40])
@pytest.mark.parametrize(("tokens", "total", "room"), [(1, 1, 0), (5, 37, 0), (5, 37, 20), (9, 9, 3)])
def test_newest_tokens_window_and_length(tokens, total, room, window):
    """The causal mask of the queries' own tokens, at the end of what counts of a longer buffer."""
    query, key, value = draw(2, 3, tokens, total + room, 16)
    key[:, total:], value[:, total:] = 9, 9
    length = torch.tensor([total]) if room else None
    packed = ops.pack_queries(query, 2)
    tree_mask = TreeMask(ops.causal_mask(tokens, tokens), length=length)
    state = ops.attention_update(
        ops.attention_start(packed), packed, key, value, AttentionParams(0.25, window, 2.0), tree_mask
    )
    expected = dense_attention(query, key[:, :total], value[:, :total], 0.25, window, softcap=2.0)
    assert_near(ops.attention_finish(state, 6, torch.float32), expected, torch.float32)


def test_tree_mask_and_positions():
    """Five nodes behind 20 keys: 0 and 1 are roots, 2 follows 0, 3 follows 2, 4 follows 1; a window of 6."""
    parents, depths = [None, None, 0, 2, 1], [0, 0, 1, 2, 1]
    mask = torch.eye(5, dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent is not None:
            mask[node] |= mask[parent]
    query, key, value = draw(1, 2, 5, 25, 16)
    packed = ops.pack_queries(query, 1)
    # On the axis of the keys, where a window of 6 before depth d begins at 20 + d - 5.
    tree_mask = TreeMask(mask, positions=torch.tensor([20 + depth for depth in depths]))
    state = ops.attention_update(ops.attention_start(packed), packed, key, value, AttentionParams(0.5, 6), tree_mask)
    output = ops.attention_finish(state, 2, torch.float32)
    for node, depth in enumerate(depths):
        seen = [j for j in range(20) if j > 20 + depth - 6] + [20 + j for j in range(5) if mask[node, j]]
        seen = [j for j in seen if j > 20 + depth - 6]
        expected = dense_attention(query[:, node : node + 1], key[:, seen], value[:, seen], 0.5)
        assert_near(output[:, node : node + 1], expected, torch.float32)


@DTYPES
def test_chunk_scores(dtype):
    query, key, _ = draw(2, 3, 5, 28, 16, dtype)
    packed, baseline = ops.pack_queries(query, 2), torch.randn(2, 15)
    means = key.double().unflatten(1, (7, 4)).mean(2).to(dtype).double()  # rounded, as a matrix instruction takes them
    wishes = (packed.double() @ means.mT * 0.25 - baseline.double()[..., None]).exp()
    expected = wishes.sum(dim=1).log().float()
    torch.testing.assert_close(ops.chunk_scores(packed, key, 4, 0.25, baseline), expected, rtol=1e-5, atol=1e-5)
    held = torch.rand(2, 7) < 0.5
    scores = ops.chunk_scores(packed, key, 4, 0.25, baseline, held)
    torch.testing.assert_close(scores, expected.masked_fill(held, -math.inf), rtol=1e-5, atol=1e-5)


@st.composite
def offers(draw_):
    """Distinct scores [K, C], some -inf (not on offer), the number of slots, and a split into tiles."""
    heads, chunks = draw_(st.integers(1, 3)), draw_(st.integers(1, 40))
    order = [draw_(st.permutations(range(chunks))) for _ in range(heads)]
    scores = torch.tensor(order, dtype=torch.float32) - chunks / 2
    absent = draw_(st.sets(st.tuples(st.integers(0, heads - 1), st.integers(0, chunks - 1)), max_size=chunks))
    for place in absent:
        scores[place] = -math.inf
    cuts = draw_(st.sets(st.integers(1, chunks), max_size=6))
    bounds = sorted({0, chunks, *cuts})
    return scores, draw_(st.integers(1, 12)), list(itertools.pairwise(bounds))


def empty_choice(heads, slots, chunks):
    scores = torch.full((heads, slots), -math.inf)
    return ChunkSelection(scores, torch.full((heads, slots), -1), torch.zeros(heads, chunks + 1, dtype=torch.bool))


@given(offers())
@settings(deadline=None, max_examples=150)
def test_streaming_top_k_is_the_global_one(case):
    """Whatever the tiles, the holding is each head's best so far, and what stays does not move."""
    scores, slots, tiles = case
    heads, chunks = scores.shape
    selection = empty_choice(heads, slots, chunks)
    for start, stop in tiles:
        before = selection.chunks.tolist()
        source = ops.select_chunks(selection, scores[:, start:stop], start)
        for head in range(heads):
            on_offer = [c for c in range(stop) if scores[head, c] > -math.inf]
            best = sorted(on_offer, key=lambda c: -scores[head, c])[:slots]
            chosen = selection.chunks[head].tolist()
            taken = [c for c in chosen if c >= 0]
            assert sorted(taken) == sorted(best)
            assert all(c >= 0 for c in chosen[: len(taken)]), "empty slots fill from the lowest"
            assert selection.scores[head].tolist() == [-math.inf if c < 0 else scores[head, c].item() for c in chosen]
            assert [c for c in range(chunks) if selection.held[head, c]] == sorted(best)
            for slot, (old, new) in enumerate(zip(before[head], chosen, strict=True)):
                assert old not in best or new == old, "a chunk that stays keeps its slot"
                assert source[head, slot] == (-1 if new == old else new - start)


def test_equal_scores_change_nothing():
    """The held chunk wins; of those on offer, the earlier."""
    selection = empty_choice(1, 3, 20)
    ops.select_chunks(selection, torch.tensor([[1.0, 1.0]]), 0)
    assert ops.select_chunks(selection, torch.tensor([[1.0, 1.0, 1.0]]), 7).tolist() == [[-1, -1, 0]]
    assert selection.chunks.tolist() == [[0, 1, 7]]
    assert ops.select_chunks(selection, torch.tensor([[1.0, -math.inf]]), 12).tolist() == [[-1, -1, -1]]
    assert ops.select_chunks(selection, torch.tensor([[2.0, 3.0]]), 14).tolist() == [[-1, 0, 1]]
    assert selection.chunks.tolist() == [[0, 14, 15]]


def test_gather_copies_what_enters_and_nothing_else():
    kv = torch.arange(2 * 2 * 12 * 3.0).reshape(2, 2, 12, 3)
    slots = torch.full((2, 2, 3, 4, 3), -1.0)
    source = torch.tensor([[2, -1, 0], [-1, 1, -1]])
    ops.put_chunks(source, kv, slots)
    for head, slot in itertools.product(range(2), range(3)):
        chunk = source[head, slot]
        expected = kv[:, head, 4 * chunk : 4 * chunk + 4] if chunk >= 0 else torch.full((2, 4, 3), -1.0)
        assert torch.equal(slots[:, head, slot], expected)
