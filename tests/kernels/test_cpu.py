"""The CPU's own versions against their eager twins."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_triforce.kernels import cpu, ops, reference


@pytest.mark.parametrize("dim", [5, 64, 80])
@pytest.mark.parametrize("rows", [1, 5, 39, 123])
@pytest.mark.parametrize("tiles", [(7,), (1, 123, 300), (64, 64)])
@pytest.mark.parametrize(
    "params", [reference.AttentionParams(0.3), reference.AttentionParams(0.3, softcap=2.0)], ids=["plain", "softcap"]
)
def test_attention(dim, rows, tiles, params):
    chance = torch.Generator().manual_seed(0)
    packed = 3 * torch.randn(3, rows, dim, generator=chance)
    states = [reference.attention_start(packed)] * 2
    for tokens in tiles:
        kv = torch.randn(2, 3, tokens + 5, dim, generator=chance)[:, :, 5:]  # strided
        functions = (cpu.attention_update, reference.attention_update)
        states = [f(state, packed, *kv, params) for f, state in zip(functions, states, strict=True)]
        ours, theirs = (reference.attention_logsumexp(state) for state in states)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    ours, theirs = (reference.attention_finish(state, 3, torch.float32) for state in states)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_half_precision_rounds_once():
    """A thousand tiles in bf16: as good as one."""
    chance = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, n, 16, generator=chance).bfloat16() for n in (2, 4000, 4000))
    attention = ops.RunningAttention()
    attention.start(query, 1, ops.AttentionParams(0.25))
    for start in range(0, 4000, 4):
        attention.update(key[:, start : start + 4], value[:, start : start + 4])
    expected = (query.double() @ key.double().mT * 0.25).softmax(-1) @ value.double()
    assert torch.equal(attention.finish(), expected.bfloat16())


@pytest.mark.parametrize("dim", [5, 64, 80])
@pytest.mark.parametrize(
    ("heads", "tokens", "before"), [(3, 1, 7), (6, 40, 300), (12, 123, 1), (3, 64, 0), (6, 5, 2000)]
)
def test_prefill_attention(heads, tokens, before, dim):
    chance = torch.Generator().manual_seed(0)
    query = 3 * torch.randn(heads, tokens, dim, generator=chance)
    key, value = torch.randn(2, 3, tokens + before + 5, dim, generator=chance)[:, :, 5:]  # strided
    params = reference.AttentionParams(0.3)
    ours, theirs = (f.prefill_attention(query, key, value, params) for f in (cpu, reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", [{"window": 9}, {"softcap": 2.0}, {"sinks": torch.ones(6)}])
def test_prefill_attention_of_other_kinds_stays_the_twins(change):
    query, (key, value) = torch.randn(6, 10, 16), torch.randn(2, 3, 40, 16)
    params = reference.AttentionParams(0.3, **change)
    ours, theirs = (f.prefill_attention(query, key, value, params) for f in (cpu, reference))
    assert torch.equal(ours, theirs)


def draw_choice(slots, count, seed):
    """Scores held by two heads, their chunks, the same as a set, and scores of ``count`` chunks on offer, 20 and on."""
    chance = torch.Generator().manual_seed(seed)

    def scores(n):
        drawn = torch.randint(0, 4, (2, n), generator=chance).float()
        return drawn.masked_fill(torch.rand(2, n, generator=chance) < 0.2, float("-inf"))

    held, offered = scores(slots).sort(dim=1, descending=True).values, scores(count)
    chunks = torch.arange(slots).repeat(2, 1).masked_fill(held.isinf(), -1)
    present = torch.zeros(2, 31, dtype=torch.bool).scatter_(1, chunks.where(chunks >= 0, 30), True)
    return held, chunks, present, offered


def assert_same_choice(one, other):
    assert torch.equal(one.scores, other.scores)
    assert torch.equal(one.chunks, other.chunks)
    assert torch.equal(one.held[:, :-1], other.held[:, :-1]), "the last column is nobody's"


@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 10**6))
@settings(deadline=None, max_examples=100)
def test_take(slots, count, seed):
    """Few distinct scores, so that ties are common; empty slots; chunks that are not on offer."""
    held, chunks, present, offered = draw_choice(slots, count, seed)
    choices = [reference.ChunkSelection(held.clone(), chunks.clone(), present.clone()) for _ in range(2)]
    kv = torch.randn(2, 2, 2 * count, 3, generator=torch.Generator().manual_seed(seed))
    stores = [torch.zeros(2, 2, slots, 2, 3) for _ in range(2)]
    for backend, choice, store in zip((cpu, reference), choices, stores, strict=True):
        backend.take_chunks(choice, offered, 20, kv, store)
    assert torch.equal(*stores)
    assert_same_choice(*choices)
