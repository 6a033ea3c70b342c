"""Draft tokens for a pass: as many as take less, of memory and of the card's time, than they bring."""

from __future__ import annotations

from dataclasses import replace

import pytest

from offload_triforce.config import Settings
from offload_triforce.graphs.steps import MOST_GRAPHS
from offload_triforce.machine.cards import find_card
from offload_triforce.machine.hardware import of_card
from offload_triforce.planner.choose import choose_settings
from offload_triforce.planner.fit import footprint, missing
from offload_triforce.planner.models import find_shape
from offload_triforce.planner.nodes import BRINGS, MOST_NODES, MULTIPLES, choose_nodes, grown
from offload_triforce.speculation.tree_drafter import step_size

CONTEXT = 131_072
CARD = of_card(find_card("RTX 4090"))
BASE = Settings(budget=4096, hidden_states="host")


@pytest.fixture(scope="module")
def llama():
    return find_shape("llama-2-7b-128k")


def test_four_times_as_many_where_a_pass_waits_for_the_link(llama):
    """Keys and values of 32 heads: 69 GB cross the link, beside which 0.9 GB more for draft tokens are little."""
    chosen = choose_nodes(llama, BASE, CONTEXT, CARD)
    assert (chosen.draft_tokens, chosen.width) == (768, 32)
    assert not missing(footprint(llama, chosen, CONTEXT), CARD.memory, None)


def test_none_where_the_card_has_no_room(llama):
    used = footprint(llama, BASE, CONTEXT).vram_bytes
    assert choose_nodes(llama, BASE, CONTEXT, replace(CARD, memory=int(used * 1.001))) == BASE


def test_none_where_they_take_the_place_of_many_tiles():
    """48 recurrent layers keep what each draft token does to them: more than a short text's keys and values bring."""
    hybrid = find_shape("qwen3.6-27b").quantized("nf4", "int8")
    twice = grown(BASE, 2)
    before, used = (footprint(hybrid, way, 65_536) for way in (BASE, twice))
    plan = used.plan
    assert used.decoding_bytes - before.decoding_bytes > BRINGS * plan.layers * plan.tiles * plan.tile_bytes
    assert choose_nodes(hybrid, BASE, 65_536, of_card(find_card("H100 80GB"))) == BASE


def test_none_where_the_card_is_slower_than_the_link(llama):
    slow = replace(CARD.speeds, tflops=CARD.speeds.tflops / 100)
    assert choose_nodes(llama, BASE, CONTEXT, replace(CARD, speeds=slow)) == BASE


@pytest.mark.parametrize(
    "own", [{"draft_tokens": 100}, {"width": 12}, {"topk": 1}, {"gamma": 0}, {"adaptive": False}], ids=str
)
def test_what_somebody_has_set_stays(llama, own):
    settings = replace(BASE, **own)
    assert choose_nodes(llama, settings, CONTEXT, CARD) == settings
    assert grown(settings, 4) == settings


def test_fixed_names_stay(llama):
    chosen = choose_settings(llama, BASE, CONTEXT, CARD, ("draft_tokens", "gamma"))
    assert (chosen.draft_tokens, chosen.width) == (None, Settings.width)
    chosen = choose_settings(llama, BASE, CONTEXT, CARD, ("gamma",))
    assert chosen.draft_tokens > Settings().most_draft_tokens


def test_there_is_an_end():
    assert grown(Settings(gamma=200), 4).draft_tokens == MOST_NODES
    assert grown(Settings(gamma=400), 4).draft_tokens == Settings(gamma=400).most_draft_tokens


def test_each_size_of_a_wide_step_can_be_captured():
    widest = grown(Settings(), MULTIPLES[-1])
    sizes = {step_size(tokens) for tokens in range(1, widest.width + widest.gamma1 + 1)}
    assert len(sizes) <= MOST_GRAPHS
    assert max(sizes) == widest.width + widest.gamma1
    assert all(step_size(tokens) <= tokens < step_size(tokens) + 4 for tokens in range(1, 100))
