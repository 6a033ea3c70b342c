"""The eager twins against float64 formulas written the plain way, KV heads repeated and all."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_triforce.kernels import reference as ops

# (relative, absolute): online attention accumulates in float32 and rounds once, to the output's type.
ONLINE = {torch.float32: (1e-6, 3e-6), torch.bfloat16: (8e-3, 1e-5), torch.float16: (1e-3, 1e-5)}
# torch's fused kernels also round the softmax weights to the input's type.
FUSED = {torch.float32: (1e-5, 3e-6), torch.bfloat16: (2e-2, 1e-2), torch.float16: (2e-3, 1e-3)}

DTYPES = pytest.mark.parametrize("dtype", ONLINE, ids=lambda dtype: str(dtype).removeprefix("torch."))


def dense_attention(query, key, value, scaling, window=None):
    """Softmax attention in float64 of the last T of n tokens: [H, T, D]. The reference of this file."""
    tokens, total = query.shape[1], key.shape[1]
    groups = query.shape[0] // key.shape[0]
    key, value = (x.double().repeat_interleave(groups, dim=0) for x in (key, value))
    scores = query.double() @ key.mT * scaling
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
        state = ops.attention_update(state, packed, key[:, part], value[:, part], scaling, mask[:, part])
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
        state = ops.attention_update(state, packed, key[:, part], value[:, part], 1.0)
    expected = (query.double() @ key.double().mT).softmax(-1) @ value.double()
    assert_near(ops.attention_finish(state, 1, torch.float32), expected, torch.float32)


def test_state_holds_log_sum_exp():
    """``maximum`` and ``total`` are what the retrieval baseline is made of."""
    query, key, value = draw(2, 3, 5, 37, 16)
    packed = ops.pack_queries(query, 2)
    state = ops.attention_update(ops.attention_start(packed), packed, key[:, :20], value[:, :20], 0.25)
    state = ops.attention_update(state, packed, key[:, 20:], value[:, 20:], 0.25)
    scores = packed.double() @ key.double().mT * 0.25
    torch.testing.assert_close(state.maximum, scores.amax(-1).float())
    torch.testing.assert_close(state.maximum + state.total.log(), scores.logsumexp(-1).float())


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
    assert_near(ops.prefill_attention(query, key, value, 0.1, window), expected, dtype, FUSED)


@DTYPES
def test_chunk_means(dtype):
    key = draw(3, 1, 1, 40, 16, dtype)[1]
    means = ops.chunk_means(key, 8)
    assert means.shape == (3, 5, 16)
    assert means.dtype == torch.float32
    for head in range(3):
        for chunk in range(5):
            expected = key[head, chunk * 8 : chunk * 8 + 8].double().mean(0)
            torch.testing.assert_close(means[head, chunk].double(), expected, rtol=1e-6, atol=1e-6)


def test_chunk_scores():
    query, key, _ = draw(2, 3, 5, 28, 16)
    packed, means = ops.pack_queries(query, 2), ops.chunk_means(key, 4)
    baseline = torch.randn(2, 15)
    wishes = (packed.double() @ means.double().mT * 0.25 - baseline.double()[..., None]).exp()
    expected = wishes.sum(dim=1).log().float()
    torch.testing.assert_close(ops.chunk_scores(packed, means, 0.25, baseline), expected)


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


@given(offers())
@settings(deadline=None, max_examples=150)
def test_streaming_top_k_is_the_global_one(case):
    """Whatever the tiles, the holding is each head's best so far, and what stays does not move."""
    scores, slots, tiles = case
    heads = scores.shape[0]
    held = torch.full((heads, slots), -math.inf)
    chosen = [[None] * slots for _ in range(heads)]
    for start, stop in tiles:
        top = ops.merge_top_chunks(held, scores[:, start:stop])
        before = [list(row) for row in chosen]
        entered = list(zip(top.head.tolist(), top.slot.tolist(), (top.chunk + start).tolist(), strict=True))
        assert len({(head, slot) for head, slot, _ in entered}) == len(entered)
        for head, slot, chunk in entered:
            assert start <= chunk < stop
            chosen[head][slot] = chunk
        held = top.scores
        for head in range(heads):
            on_offer = [c for c in range(stop) if scores[head, c] > -math.inf]
            best = sorted(on_offer, key=lambda c: -scores[head, c])[:slots]
            taken = [c for c in chosen[head] if c is not None]
            assert sorted(taken) == sorted(best)
            assert all(c is not None for c in chosen[head][: len(taken)]), "empty slots fill from the lowest"
            expected = [-math.inf if c is None else scores[head, c].item() for c in chosen[head]]
            assert held[head].tolist() == expected
            for slot, chunk in enumerate(before[head]):
                assert chunk not in best or chosen[head][slot] == chunk, "a chunk that stays keeps its slot"


def test_merge_with_nothing_on_offer_changes_nothing():
    held = torch.tensor([[3.0, -math.inf, 1.0]])
    top = ops.merge_top_chunks(held, torch.full((1, 4), -math.inf))
    assert len(top.head) == len(top.slot) == len(top.chunk) == 0
    assert torch.equal(top.scores, held)
