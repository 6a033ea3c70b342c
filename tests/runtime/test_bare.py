"""A CPU without a link: tiles are attended to where they lie, and what comes out is what a link would bring."""

from __future__ import annotations

import pytest

from offload_triforce import TriForce
from offload_triforce.runtime import runtime
from offload_triforce.scheduler.host import HostDevice
from offload_triforce.scheduler.store import TileStore
from tests.speculation.toys import Settled
from tests.tiny import greedy, prompt_ids, tiny_model

HOW = {"budget": 64, "sink": 8, "recent": 16, "tile": 32, "draft_cache": 64, "chunk": 4, "gamma": 6, "context": 320}
PROMPT, NEW = prompt_ids(200), 36


def answer(family, temperature=0.0, **changes):
    with TriForce(tiny_model(family, seed=1, calm=True), **{**HOW, "draft": "ngram", **changes}) as engine:
        result = engine.generate(PROMPT, max_new_tokens=NEW, temperature=temperature, seed=3)
        return result, engine.runtime.device, engine.runtime.caches.full.stream


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3.5"])
def test_greedy_is_transformers(family):
    result, device, stream = answer(family)
    assert result.token_ids == greedy(tiny_model(family, seed=1, calm=True), PROMPT, NEW)
    assert isinstance(device, HostDevice)
    assert (result.stats.link_bytes, result.stats.prefill_link_bytes) == (0, 0)
    assert stream._ring._total == 0


def test_at_a_temperature_it_is_what_a_link_brings():
    """With the same seed, token for token, whatever is drafted and by whom."""
    bare, linked = answer("llama", 0.8)[0], answer("llama", 0.8, link_gbps=1000.0, draft_cost=0.05)[0]
    plain = answer("llama", 0.8, gamma=0, draft="none")[0]
    assert bare.token_ids == linked.token_ids == plain.token_ids
    assert linked.stats.link_bytes > 0


def test_look_up_drafts_for_the_target_while_level_1_rests():
    stats = answer("llama")[0].stats
    assert stats.draft.proposed > 0
    assert stats.steps < stats.passes


@pytest.mark.parametrize("settled", [{"draft_cost": 0.05}, {"adaptive": False}, {"draft": "none", "draft_cost": 0.05}])
def test_whoever_settles_what_drafting_costs_gets_level_1(settled):
    stats = answer("llama", **settled)[0].stats
    assert stats.steps >= stats.passes


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3.5"])
def test_what_level_1_has_not_seen_while_it_rested_it_catches_up_with(monkeypatch, family):
    """Rounds with it and without it in turns: the same text."""
    monkeypatch.setattr(runtime, "Trials", lambda: Settled((True, True, False)))
    result, _, _ = answer(family)
    assert result.token_ids == greedy(tiny_model(family, seed=1, calm=True), PROMPT, NEW)
    assert result.stats.steps > 0
    assert result.stats.retrieval.accepted > 0


def test_a_lost_tile_shows(monkeypatch):
    real = TileStore.together
    monkeypatch.setattr(TileStore, "together", lambda self, layer, tiles: real(self, layer, tiles - 1))
    assert answer("llama")[0].token_ids != greedy(tiny_model("llama", seed=1, calm=True), PROMPT, NEW)
