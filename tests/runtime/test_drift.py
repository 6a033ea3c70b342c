"""States that are carried from pass to pass stay those of the text: after hundreds and thousands of tokens."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessorList

from offload_triforce.cache.recurrent import RecurrentCache
from offload_triforce.config import Settings
from offload_triforce.model.adapter import attached
from offload_triforce.model.layout import probe
from offload_triforce.runtime.runtime import Runtime
from offload_triforce.runtime.session import Session
from offload_triforce.speculation.acceptance import Coupled
from offload_triforce.speculation.hierarchy import decode
from offload_triforce.speculation.noise import Noise
from offload_triforce.speculation.sampling import Sampler
from offload_triforce.speculation.stats import DecodeStats
from offload_triforce.speculation.text import TokenText
from tests.tiny import VOCABULARY, prompt_ids, tiny_model

PROMPT = 60
SETTINGS = Settings(
    budget=24,
    recent=8,
    bits=16,
    gamma=5,
    gamma1=0,
    draft_tokens=10,
    topk=2,
    width=2,
    adaptive=False,
    draft_cost=0.01,
    tile=64,
    resident=0.0,
)


def drift(new):
    """Decode so many tokens in trees, and read them anew: the largest relative error of a layer's state, and of its
    convolution's newest inputs; and what was counted.
    """
    model, limit = tiny_model("qwen3.5", max_position_embeddings=8192), PROMPT + new + 1
    runtime = Runtime(model, probe(model), SETTINGS, limit)
    text, stats = TokenText(prompt_ids(PROMPT)[0], limit), DecodeStats()
    rule = Coupled(Sampler(LogitsProcessorList(), True, VOCABULARY), Noise(1, PROMPT, VOCABULARY, torch.device("cpu")))
    try:
        with attached(model), torch.no_grad():
            session, caches = Session(runtime), runtime.caches
            session.begin(text.ids[:-1])
            target, tree_drafter = runtime.levels([], rule, stats, lambda token: False)
            for _ in decode(target, tree_drafter, rule, text, new, stats, lambda text: False):
                pass
            assert caches.length == len(text) - 1 == PROMPT + new - 1
            carried = caches.recurrent.snapshot()
            session.begin(text.ids[:-1])
            anew = caches.recurrent.snapshot()
    finally:
        runtime.close()

    def apart(name):
        pairs = zip(carried[name], anew[name], strict=True)
        return max(float((one - other).norm() / other.norm()) for one, other in pairs)

    return apart("state"), apart("tail"), stats


@pytest.mark.parametrize("new", [250, pytest.param(5000, marks=pytest.mark.slow)])
def test_no_state_drifts(new):
    state, tail, stats = drift(new)
    assert state <= 1e-4
    assert tail <= 1e-4
    assert stats.new_tokens == new
    assert stats.passes < new / 1.1
    assert stats.retrieval.judged > stats.retrieval.accepted + new / 100, "in trees, not all of which are right"


def test_a_state_in_16_bits_shows(monkeypatch):
    settle = RecurrentCache.settle

    def rounding(self, tokens):
        settle(self, tokens)
        self.state.copy_(self.state.bfloat16())

    monkeypatch.setattr(RecurrentCache, "settle", rounding)
    assert drift(100)[0] > 1e-4
