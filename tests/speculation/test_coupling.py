"""Coupling: whatever is drafted, however, and how much of it, the answer is the one of plain decoding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from offload_triforce.speculation import acceptance as rules
from offload_triforce.speculation.acceptance import Coupled, Place, Ranking
from offload_triforce.speculation.noise import Noise
from tests.speculation.toys import BROUGHT, PROMPT, Case, Scores, real_sampler

CPU = torch.device("cpu")
FIRST = 2  # position of the first new token


def noise(seed):
    return Noise(seed, FIRST, 3, CPU)


@st.composite
def cases(draw):
    gamma = draw(st.integers(1, 5))
    return {
        "draft": draw(st.sampled_from(["none", "onehot", "sampled"])),
        "gamma": gamma,
        "gamma1": draw(st.integers(0, 3)),
        "nodes": draw(st.integers(gamma, 12)),
        "topk": draw(st.integers(1, 3)),
        "width": draw(st.integers(1, 4)),
        "spare": draw(st.integers(0, 4)),
        "tokens": draw(st.integers(1, 14)),
        "more": draw(st.integers(0, 3)),
        "style": draw(st.sampled_from(["full", "cut"])),
        "seed": draw(st.integers(0, 1000)),
        "adaptive": draw(st.sampled_from([None, 0.01, 0.2, 2.0])),
        "likeness": draw(st.sampled_from([0.0, 0.7, 0.95])),
    }


def plain(case, race):
    """The target alone, token by token."""
    out = []
    while len(out) < case.tokens and out[-1:] != [2]:
        out.append(int((case.tables.row(0, 0, out).log() + race(FIRST + len(out))).argmax()))
    return tuple(out)


def plain_with(case, race, processor):
    """The same with a logits processor."""
    out = []
    while len(out) < case.tokens and out[-1:] != [2]:
        scores = case.tables.row(0, 0, out).log().float()[None]
        scores = processor(torch.tensor([PROMPT.tolist() + out]), scores)[0]
        out.append(int((scores + race(FIRST + len(out))).argmax()))
    return tuple(out)


@settings(deadline=None, max_examples=400)
@given(cases(), st.integers(0, 2**40))
def test_sampling_is_plain_decoding_with_the_same_noise(options, seed):
    case, gumbel = Case(**options), noise(seed)
    out, _ = case.run(Coupled(Scores(), noise(seed)))
    assert out == plain(case, gumbel.at)


@settings(deadline=None, max_examples=150)
@given(cases(), st.integers(0, 2**40), st.sampled_from(list(BROUGHT)))
def test_so_it_is_with_processors_of_users(options, seed, brought):
    """Each is called as it would be without any drafts: once per token, in order, and never behind the end."""
    case, gumbel, sampler = Case(**options), noise(seed), real_sampler(brought)
    out, _ = case.run(Coupled(sampler, noise(seed)))
    assert out == plain_with(case, gumbel.at, BROUGHT[brought]())
    if brought in ("unknown", "forks"):
        ids = [*PROMPT.tolist(), *out]
        assert sampler._processors[0].seen == [ids[:length] for length in range(len(PROMPT), len(ids))]


@settings(deadline=None, max_examples=200)
@given(cases())
def test_greedy_is_plain_greedy(options):
    case = Case(**options)
    out, _ = case.run(Coupled(Scores(), None))
    assert out == plain(case, lambda position: 0.0)


def counted(**options):
    """Accepted draft tokens, rejections and passes over many noises."""
    accepted = rejected = passes = 0
    for seed in range(40):
        case = Case(**{"tokens": 20, "likeness": 0.5, "seed": 3, **options}, endless=True)
        _, stats = case.run(Coupled(Scores(), noise(seed)))
        accepted, passes = accepted + stats.retrieval.accepted, passes + stats.passes
        rejected += stats.retrieval.judged - stats.retrieval.accepted
    return accepted, rejected, passes


def test_it_is_not_plain_decoding_for_want_of_draft_tokens():
    """The tests above would hold as well if nothing were ever accepted. Trees accept more, and drafting ahead too."""
    chain = counted(gamma=4)
    tree = counted(gamma=4, nodes=10, topk=3, width=2)
    assert chain[0] > 400
    assert chain[1] > 100
    assert tree[0] > chain[0]
    assert 0 < tree[1] < chain[1]
    assert tree[2] < chain[2]


@pytest.mark.parametrize("mutation", ["other noise", "no noise", "draft has a say", "wrong place"])
def test_mistakes_show(monkeypatch, mutation):
    """They change what comes out, or how much of it was drafted right."""
    right, before, other = [], counted(gamma=4, nodes=8, topk=2), torch.Generator().manual_seed(0)
    race, candidates_of = Coupled._race, Coupled.candidates

    def mutant(self, scores, places):
        if mutation == "wrong place":
            places = [Place(place.prefix, place.position + 1) for place in places]
        return scores if mutation == "no noise" else race(self, scores, places)

    def noisy(self, logits, places, drafted):
        if mutation == "other noise":
            logits = logits + 2 * torch.randn(logits.shape, generator=other)
        return candidates_of(self, logits, places, drafted)

    verdict = Coupled.verdict

    def swayed(self, logits, place, candidates, offered, told):
        token = verdict(self, logits, place, candidates, offered, told)
        return candidates.tokens[0] if offered and mutation == "draft has a say" else token

    monkeypatch.setattr(Coupled, "_race", mutant)
    monkeypatch.setattr(Coupled, "verdict", swayed)
    monkeypatch.setattr(Coupled, "candidates", noisy)
    for seed in range(40):
        case = Case(gamma=3, nodes=6, topk=2, width=2, tokens=10, likeness=0.8, seed=seed)
        out, _ = case.run(Coupled(Scores(), noise(seed)))
        right.append(out == plain(case, noise(seed).at))
    if mutation == "other noise":  # at level 1 alone: exact all the same, but for nothing
        assert counted(gamma=4, nodes=8, topk=2)[1] > 2 * before[1]
    else:
        assert not all(right)


def test_noise_is_gumbel():
    """argmax(log p + noise) has distribution p."""
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    source = Noise(5, 0, 4, CPU)
    taken = torch.stack([(p.log() + source.at(i)).argmax() for i in range(8000)])
    seen = torch.bincount(taken, minlength=4).double().numpy()
    assert chisquare(seen, (8000 * p).double().numpy()).pvalue > 1e-3


def test_noise_does_not_depend_on_who_asks_when():
    one, other, third = noise(7), noise(7), noise(8)
    late = other.at(FIRST + 9)
    assert torch.equal(one.at(FIRST), other.at(FIRST))
    one.forget(FIRST + 9)
    assert torch.equal(one.at(FIRST + 9), late)
    assert not torch.equal(third.at(FIRST), other.at(FIRST))
    assert not torch.equal(other.at(FIRST), other.at(FIRST + 1))
    with pytest.raises(IndexError, match="position 10 has been forgotten"):
        one.at(FIRST + 8)


def test_all_bits_of_a_seed_count():
    assert not torch.equal(noise(7).at(FIRST), noise(7 + 2**32).at(FIRST))


def test_ranking_by_hand():
    ranking = Ranking([3.0, 2.7, 1.0, float("-inf")], [5, 8, 2, 9])
    assert ranking.tokens == [5, 8, 2]
    assert [ranking.token(rank) for rank in range(5)] == [5, 8, 2, None, None]
    assert [ranking.kind(rank) for rank in range(3)] == [int(0.3 / rules.GAP), int(0.3 / rules.GAP), int(2 / rules.GAP)]
    assert ranking.kind(3) == rules.KINDS - 1
    assert Ranking([1.0], [4]).kind(0) == rules.KINDS - 1, "nothing comes near"


def test_priors_are_odds():
    for prior in (rules.COUPLING_PRIOR, rules.RESAMPLING_PRIOR):
        odds = torch.tensor(prior)
        assert odds.shape == (rules.MOST_CANDIDATES, rules.KINDS)
        assert bool(((odds >= 0) & (odds <= 1)).all())
        assert bool((odds[0] >= odds[1]).all())
