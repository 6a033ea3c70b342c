"""Every combination of settings says what plain decoding says, with real (tiny) models."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_triforce import TriForce
from offload_triforce.cache.retrieval import RetrievalCache
from offload_triforce.kernels import reference
from tests.stateful import Counting, Forking, Fussy, Moody
from tests.tiny import RECURRENT, greedy, prompt_ids, tiny_model

PROMPT, NEW = 179, 32
FAMILIES = ("llama", "gemma3", "qwen2-sliding", "qwen3-moe", *sorted(RECURRENT))
SMALL = {"budget": 64, "sink": 8, "recent": 16, "tile": 32, "draft_cache": 64, "prefill_chunk": 100}


@cache
def model_of(family):
    return tiny_model(family, seed=1, calm=True)


# Logits processors that a user may bring along: with a state, without a copy of it or with one, and declared.
BROUGHT = {"none": None, "counts": Counting, "forks": Forking, "by scores": Moody, "rejects": lambda: Fussy("raises")}


def brought_by(name):
    return {} if BROUGHT[name] is None else {"logits_processor": [BROUGHT[name]()]}


@cache
def plain(family, temperature, seed, brought="none"):
    """Transformers' own where it is greedy; else our decoding without any draft tokens."""
    if temperature == 0:
        return greedy(model_of(family), prompt_ids(PROMPT), NEW, **brought_by(brought))
    with TriForce(model_of(family), draft="none", gamma=0, **SMALL) as engine:
        options = {"max_new_tokens": NEW, "temperature": temperature, "seed": seed, **brought_by(brought)}
        return engine.generate(prompt_ids(PROMPT), **options).token_ids


@st.composite
def ways(draw):
    gamma = draw(st.integers(1, 9))
    tree = draw(st.sampled_from([None, gamma, 2 * gamma + 1, 24]))
    return {
        "gamma": gamma,
        "gamma1": draw(st.integers(0, 4)),
        "draft_tokens": tree,
        "topk": draw(st.integers(1, 4)),
        "width": draw(st.integers(1, 5)),
        "adaptive": draw(st.booleans()),
        "draft_cost": draw(st.sampled_from([None, 0.01, 0.2])),
        "refresh": draw(st.booleans()),
        "overlap": draw(st.booleans()),
        "chunk": draw(st.sampled_from([4, 8])),
        "bits": draw(st.sampled_from([4, 8, 16])),
        "resident": draw(st.sampled_from([0.0, 0.4, 1.0])),
        "prefill_resident": draw(st.sampled_from([None, 0.1])),
        "hidden_states": draw(st.sampled_from([None, "host"])),
    }


@settings(deadline=None, max_examples=14)
@given(
    st.sampled_from(FAMILIES),
    ways(),
    st.sampled_from(["ngram", "self", "ngram+self", "none"]),
    st.sampled_from([0.0, 0.7, 1.3]),
    st.integers(0, 2),
    st.sampled_from(list(BROUGHT)),
)
@pytest.mark.filterwarnings("ignore:drafts are made without")
def test_any_way_is_plain_decoding(family, way, draft, temperature, seed, brought):
    with TriForce(model_of(family), draft=draft, **{**SMALL, **way}) as engine:
        options = {"max_new_tokens": NEW, "temperature": temperature, "seed": seed, **brought_by(brought)}
        result = engine.generate(prompt_ids(PROMPT), **options)
    assert result.token_ids == plain(family, temperature, seed, brought)


@pytest.mark.parametrize(("family", "temperature"), zip(sorted(RECURRENT), [0.0, 0.7] * len(RECURRENT), strict=False))
def test_a_hybrid_drafts_for_another_model(family, temperature):
    """As level 0, over a cache whose window moves while its states go on."""
    way = {**SMALL, "gamma": 6, "gamma1": 3, "draft_cost": 0.05, "draft_cache": 24}
    with TriForce(model_of("llama"), draft=model_of(family), **way) as engine:
        result = engine.generate(prompt_ids(PROMPT), max_new_tokens=NEW, temperature=temperature, seed=1)
    assert result.token_ids == plain("llama", temperature, 1)
    assert result.stats.draft.judged > 0


@settings(deadline=None, max_examples=2)
@given(ways(), st.sampled_from(["none", "self", "ngram+self"]), st.sampled_from([0.0, 0.7, 1.3]), st.integers(0, 2))
@pytest.mark.parametrize("family", sorted(RECURRENT))
def test_so_are_hybrids_of_each_kind(family, way, draft, temperature, seed):
    """Often enough that each kind meets trees, chains, and itself as level 0."""
    with TriForce(model_of(family), draft=draft, **{**SMALL, **way}) as engine:
        result = engine.generate(prompt_ids(PROMPT), max_new_tokens=NEW, temperature=temperature, seed=seed)
    assert result.token_ids == plain(family, temperature, seed)


def counts(family="llama", **way):
    """Statistics of one greedy answer with a fixed way."""
    fixed = {"gamma": 6, "draft_tokens": 16, "topk": 3, "width": 3, "gamma1": 0, "draft_cost": 0.01, "draft": "none"}
    with TriForce(model_of(family), **{**SMALL, **fixed, **way}) as engine:
        result = engine.generate(prompt_ids(PROMPT), max_new_tokens=NEW, do_sample=False)
    assert result.token_ids == plain(family, 0.0, 0)
    return result.stats


def test_each_lever_is_there():
    """The tests above would hold as well if a setting did nothing."""
    chain = counts(draft_tokens=6, topk=1, width=1, adaptive=False, overlap=False)
    tree = counts(adaptive=False, overlap=False)
    ahead = counts(adaptive=False)
    assert chain.draft_tokens <= 6 * chain.passes
    assert tree.draft_tokens > 10 * tree.passes
    assert tree.passes < chain.passes
    assert chain.steps_ahead == tree.steps_ahead == 0
    assert ahead.steps_ahead > ahead.passes
    dear, cheap = (counts(draft_cost=cost, overlap=False) for cost in (0.5, 0.001))
    assert dear.steps / dear.passes < cheap.steps / cheap.passes


def test_lost_chunks_show(monkeypatch):
    """A packed store that gives back nothing of what was put there: draft tokens are worse, the answer is the same."""
    before = counts(bits=8, budget=240, overlap=False)
    monkeypatch.setattr(reference, "encode_chunks", lambda source, kv, coded: None)
    assert counts(bits=8, budget=240, overlap=False).passes > before.passes


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_chunks_draft_as_well_as_plain_ones(bits):
    """At the same number of tokens: within a few passes."""
    plain_passes, packed = (counts(bits=b, adaptive=False, overlap=False).passes for b in (16, bits))
    assert abs(packed - plain_passes) <= 3


def test_the_choice_made_once_stays(monkeypatch):
    """``refresh`` decides whether passes choose; what is chosen shows in the draft tokens, never in the answer."""
    seen = []
    refresh = RetrievalCache.refresh

    def noting(self, layer, packed, baseline, scaling, length, anew=True):
        seen.append(anew)
        return refresh(self, layer, packed, baseline, scaling, length, anew)

    monkeypatch.setattr(RetrievalCache, "refresh", noting)
    counts(refresh=False)
    layers = 3
    assert seen.count(True) <= 2 * layers, "by the prompt's queries alone"
    before = len(seen)
    counts(refresh=True)
    assert all(seen[before:])
