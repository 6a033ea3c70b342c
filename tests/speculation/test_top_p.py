"""Top-p by the likeliest tokens alone: the very scores of transformers' warper, wherever it says so."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import TopPLogitsWarper

from offload_triforce.speculation import top_p
from offload_triforce.speculation.top_p import MOST, QuickTopP


def warped(scores, limit, least=1, filler=-torch.inf):
    """Of transformers; ours, and where that is certain."""
    warper = TopPLogitsWarper(limit, filler, least)
    ours, certain = QuickTopP(warper)(scores.clone())
    return warper(None, scores), ours, certain


ROW = st.lists(
    st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 4.0, 9.0, -3.0, -torch.inf]), min_size=1, max_size=14
).map(torch.tensor)


@settings(deadline=None, max_examples=400)
@given(ROW, st.floats(0, 1), st.integers(1, 4), st.sampled_from([-torch.inf, -1e4]))
def test_few_tokens_with_ties(row, limit, least, filler):
    theirs, ours, certain = warped(row[None], limit, least, filler)
    assert torch.equal(theirs, ours) or not certain


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10**6),
    st.sampled_from([0.0, 0.01, 1.0, 3.0, 8.0]),
    st.floats(0.01, 0.999),
    st.sampled_from([0, 1, 3, 4000]),
    st.sampled_from([0, 10, 1000]),
    st.sampled_from([None, 1, 8]),
)
def test_many_tokens(seed, spread, limit, gone, peaks, levels):
    """Flat and peaked ones, with tokens ruled out, and with ties: scores rounded to an eighth or to whole numbers."""
    scores = spread * torch.randn(6, 5000, generator=torch.Generator().manual_seed(seed))
    scores[:, :peaks] += 6.0
    if levels:
        scores = (scores * levels).round() / levels
    scores[:, 5000 - gone :] = -torch.inf
    theirs, ours, certain = warped(scores, limit)
    assert torch.equal(theirs[certain], ours[certain])


def test_it_is_certain_where_few_tokens_are_likely():
    """Or else it would gain nothing."""
    scores = 4.0 * torch.randn(400, 20_000, generator=torch.Generator().manual_seed(0))
    theirs, ours, certain = warped(scores, 0.9)
    assert certain.float().mean() > 0.95
    assert torch.equal(theirs[certain], ours[certain])
    assert 3 < int((ours > -torch.inf).sum(1).float().mean()) < MOST


def named():
    """What it cannot tell."""
    flat = torch.zeros(1, 3 * MOST)
    yield "flat", flat, 0.5
    yield "more tokens than are looked at", flat + 1e-3 * torch.randn(flat.shape), 0.9
    tied = torch.cat([torch.tensor([[5.0, 4.0, 4.0, 4.0]]), torch.full((1, 50), -5.0)], 1)
    yield "a tie where it ends", tied, 0.75
    yield "at the limit itself", torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log(), 0.75
    yield "no numbers", torch.tensor([[0.0, torch.nan, 1.0]]), 0.5
    yield "infinite", torch.tensor([[0.0, torch.inf, 1.0]]), 0.5
    yield "nothing left", torch.full((1, 9), -torch.inf), 0.5
    yield "everything", torch.tensor([[30.0, 2.0, 1.0]]), 1.0


@pytest.mark.parametrize(("scores", "limit"), [case[1:] for case in named()], ids=[case[0] for case in named()])
def test_what_it_cannot_tell(scores, limit):
    assert warped(scores, limit)[2].tolist() == [False]


def test_what_rounding_decides_is_left_to_the_warper(monkeypatch):
    """Sums that transformers gets wrong by thousands of roundings: without the margin, other tokens would stay."""
    scores = torch.zeros(1, 150_000)
    scores[0, :30] = 9.0 + 1e-3 * torch.arange(30)
    ranked = scores[0].double().softmax(0).sort(descending=True).values.cumsum(0)
    limits = [float(mass) + shift for mass in ranked[5:28] for shift in (-1e-6, 1e-6)]
    assert not any(warped(scores, limit)[2] for limit in limits)
    monkeypatch.setattr(top_p, "ROUNDING", 0.0)
    monkeypatch.setattr(top_p, "EXPONENTIALS", 0.0)
    found = [warped(scores, limit) for limit in limits]
    assert any(certain and not torch.equal(theirs, ours) for theirs, ours, certain in found)
