"""Learned attention sinks: one more score per query head, which counts once, however many parts the keys come in."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_triforce.kernels import cpu, ops, reference
from offload_triforce.kernels.types import AttentionParams, TreeMask
from tests.usual import sampled

# Beside scores of a few units: far below them all, among them, and far above, where exp(sink) is infinite in float32.
PLACES = {"below": -300.0, "among": 1.0, "above": 300.0}


def draw(device, kv_heads, groups, tokens, keys, dim, dtype=torch.float32):
    """Query [H, T, D], and key and value [2, K, n, D]."""
    generator = torch.Generator().manual_seed(tokens + keys)
    shapes = (kv_heads * groups, tokens, dim), (2, kv_heads, keys, dim)
    return [torch.randn(shape, generator=generator).to(dtype).to(device) for shape in shapes]


def draw_sinks(device, heads, middle=1.0, dtype=torch.float32):
    """A different one for each query head, so that none can stand for another's."""
    return torch.linspace(middle - 2, middle + 2, heads).to(dtype).to(device)


def dense(query, key, value, params):
    """As the models' own code has it, in float64: a column of sinks beside the scores, dropped after the softmax."""
    heads, tokens, _ = query.shape
    key, value = (x.double().repeat_interleave(heads // key.shape[0], dim=0) for x in (key, value))
    scores = query.double() @ key.mT * params.scaling
    if params.softcap is not None:
        scores = params.softcap * (scores / params.softcap).tanh()
    seen = reference.causal_mask(tokens, key.shape[1], params.window, query.device)
    sinks = params.sinks.double()[:, None, None].expand(heads, tokens, 1)
    return torch.cat([scores.masked_fill(~seen, -math.inf), sinks], dim=-1).softmax(dim=-1)[..., :-1] @ value


def in_parts(query, key, value, params, cuts):
    """Through one running attention: older keys in parts, then the queries' own."""
    attention, tokens = ops.RunningAttention(), query.shape[1]
    attention.start(query, key.shape[0], params)
    ends = [0, *cuts, key.shape[1] - tokens]
    for start, end in itertools.pairwise(ends):
        if end > start:
            attention.update(key[:, start:end], value[:, start:end])
    attention.update(key[:, ends[-1] :], value[:, ends[-1] :], ops.own_tokens(tokens, query.device))
    return attention


def assert_near(actual, expected, dtype=torch.float32):
    rtol, atol = {torch.float32: (1e-5, 3e-6), torch.float16: (2e-3, 1e-3), torch.bfloat16: (2e-2, 1e-2)}[dtype]
    torch.testing.assert_close(actual, expected.to(dtype), rtol=rtol, atol=atol)


@pytest.fixture(params=["torch", "triton"])
def way(request, monkeypatch):
    """The eager twins, and the kernels: compiled on a GPU, else interpreted."""
    if request.param == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv(ops.CHOICE, request.param)
    return request.param


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("cuts", [(), (1, 2, 9), (30,)], ids=str)
def test_a_sink_counts_once_however_the_keys_come(device, way, cuts, place):
    query, (key, value) = draw(device, 2, 3, 5, 47, 80)
    params = AttentionParams(0.3, sinks=draw_sinks(device, 6, PLACES[place]))
    output = in_parts(query, key, value, params, cuts).finish()
    assert output.isfinite().all()
    assert_near(output, dense(query, key, value, params))


SHAPES = [(1, 1, 1, 64), (3, 1, 5, 80), (1, 5, 13, 96), (2, 7, 3, 72)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(("dtype", "kv_heads", "groups", "tokens", "dim"), sampled(DTYPES, SHAPES, share=2), ids=str)
def test_odd_shapes(device, way, kv_heads, groups, tokens, dim, dtype):
    """Blocks of rows that lie across several query heads, and sinks in the model's own type."""
    query, (key, value) = draw(device, kv_heads, groups, tokens, 61 + tokens, dim, dtype)
    params = AttentionParams(dim**-0.5, sinks=draw_sinks(device, kv_heads * groups, 2.0, dtype))
    output = in_parts(query, key, value, params, (7, 40)).finish()
    assert output.dtype == dtype
    assert_near(output, dense(query, key, value, params), dtype)


@pytest.mark.parametrize("splits", [1, 4, 32])
def test_a_sink_counts_once_for_all_splits(device, splits, monkeypatch):
    """Most of 32 splits get no keys at all."""
    states = pytest.importorskip("offload_triforce.kernels.attention_state", reason="needs Triton")
    monkeypatch.setenv(ops.CHOICE, "triton")
    monkeypatch.setattr(states, "split_count", lambda *_: splits)
    monkeypatch.setattr(states, "state_layout", states.state_layout.__wrapped__)
    query, (key, value) = draw(device, 2, 3, 5, 200, 64)
    params = AttentionParams(0.2, sinks=draw_sinks(device, 6, 3.0))
    assert_near(in_parts(query, key, value, params, (100,)).finish(), dense(query, key, value, params))


@pytest.mark.parametrize(("keys", "cuts"), [(5, ()), (47, ()), (47, (1, 2, 9))])
def test_a_sink_counted_per_tile_shows(device, keys, cuts, monkeypatch):
    """A mistake: it joins with each part of the keys, not at the end. Where they come in one that is the same."""
    monkeypatch.setenv(ops.CHOICE, "torch")
    query, (key, value) = draw(device, 2, 3, 5, keys, 80)
    params = AttentionParams(0.3, sinks=draw_sinks(device, 6, 1.0))
    update, finish = reference.attention_update, reference.attention_finish

    def per_tile(state, packed, key, value, params, tree_mask=None):
        maximum, total, weighted = update(state, packed, key, value, params, tree_mask)
        sink = params.sinks.reshape(2, 3).repeat_interleave(5, dim=1)
        return reference.PartialAttention(maximum, total + (sink - maximum).exp(), weighted)

    expected = dense(query, key, value, params)
    monkeypatch.setattr(reference, "attention_update", per_tile)
    monkeypatch.setattr(cpu, "attention_update", per_tile)
    monkeypatch.setattr(reference, "attention_finish", lambda state, heads, dtype, sinks: finish(state, heads, dtype))
    output = in_parts(query, key, value, params, cuts).finish()
    if keys == 5:
        assert_near(output, expected)
    else:
        assert (output - expected).abs().max() > 0.01


@pytest.mark.parametrize("splits", [1, 4])
def test_a_sink_counted_per_split_shows(device, splits, monkeypatch):
    """A mistake: each split of the kernel's brings the sink along."""
    states = pytest.importorskip("offload_triforce.kernels.attention_state", reason="needs Triton")
    monkeypatch.setenv(ops.CHOICE, "triton")
    monkeypatch.setattr(states, "split_count", lambda *_: splits)
    monkeypatch.setattr(states, "state_layout", states.state_layout.__wrapped__)
    launch = states.combine_launch
    monkeypatch.setattr(
        states, "combine_launch", lambda *given, sinks, **how: launch(*given, sinks=sinks + math.log(splits), **how)
    )
    query, (key, value) = draw(device, 2, 3, 5, 100, 64)
    params = AttentionParams(0.2, sinks=draw_sinks(device, 6, 1.0))
    output, expected = in_parts(query, key, value, params, (40,)).finish(), dense(query, key, value, params)
    if splits == 1:
        assert_near(output, expected)
    else:
        assert (output - expected).abs().max() > 0.01


def test_the_log_sum_exp_is_that_of_the_keys(device, way):
    """It is taken in the middle, and what goes on afterwards must not know the sink yet."""
    query, (key, value) = draw(device, 2, 3, 5, 47, 64)
    plain = AttentionParams(0.3)
    params = plain._replace(sinks=draw_sinks(device, 6, 5.0))
    runs = [in_parts(query, key, value, each, (20,)) for each in (plain, params)]
    assert torch.equal(runs[0].logsumexp(), runs[1].logsumexp())
    assert torch.equal(runs[1].finish(), runs[1].finish()), "to finish changes no state"
    assert not torch.allclose(runs[0].finish(), runs[1].finish(), atol=1e-2)


def test_layers_with_other_sinks_share_what_is_bound(device, monkeypatch):
    """Bound launches are told apart by what they were compiled with, not by sinks: each layer has its own."""
    pytest.importorskip("triton")
    monkeypatch.setenv(ops.CHOICE, "triton")
    query, (key, value) = draw(device, 2, 3, 5, 64, 64)
    attention, own = ops.RunningAttention(), ops.own_tokens(5, device)
    for layer in range(3):
        params = AttentionParams(0.3, sinks=draw_sinks(device, 6, float(layer)))
        attention.start(query, 2, params)
        attention.update(key[:, -5:], value[:, -5:], own)
        attention.update(key[:, :59], value[:, :59])
        assert_near(attention.finish(), dense(query, key, value, params))
    assert len(attention._tiles._bound) == 1


def test_a_query_that_sees_nothing_gets_nothing(device, way):
    query, (key, value) = draw(device, 1, 2, 3, 9, 64)
    attention = ops.RunningAttention()
    attention.start(query, 1, AttentionParams(0.3, sinks=draw_sinks(device, 2)))
    attention.update(key, value, TreeMask(torch.zeros(3, 9, dtype=torch.bool, device=device)))
    assert not attention.finish().any()


@pytest.mark.parametrize("window", [None, 7, 1500])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("tokens", [1, 5])
def test_prefill(device, tokens, window, softcap):
    """More keys than go through at once; neither scaling nor soft-capping applies to a sink."""
    query, (key, value) = draw(device, 2, 3, tokens, 2100, 16)
    params = AttentionParams(0.5, window, softcap, draw_sinks(device, 6, 4.0))
    assert_near(ops.prefill_attention(query, key, value, params), dense(query, key, value, params))


def test_prefill_in_kernels(device, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv(ops.CHOICE, "triton")
    for window in (None, 9):
        query, (key, value) = draw(device, 2, 3, 33, 70, 64, torch.bfloat16)
        params = AttentionParams(0.2, window, sinks=draw_sinks(device, 6, 2.0, torch.bfloat16))
        assert_near(ops.prefill_attention(query, key, value, params), dense(query, key, value, params), torch.bfloat16)


@given(
    st.lists(st.floats(-60, 60), min_size=4, max_size=4),
    st.lists(st.integers(0, 40), max_size=5).map(sorted),
    st.integers(1, 6),
)
@settings(deadline=None, max_examples=30)
def test_any_sinks_and_any_parts(sinks, cuts, tokens):
    query, (key, value) = draw(torch.device("cpu"), 2, 2, tokens, 40 + tokens, 12)
    params = AttentionParams(2.0, sinks=torch.tensor(sinks))
    assert_near(in_parts(query, key, value, params, cuts).finish(), dense(query, key, value, params))
