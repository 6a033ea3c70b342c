"""Sizes: every known model on every known card by hand, and tiny models against what a runtime really allocates."""

import pytest
import torch

from offload_triforce.config import Settings
from offload_triforce.machine.cards import CARDS, find_card
from offload_triforce.machine.hardware import of_card
from offload_triforce.model.layout import probe
from offload_triforce.model.names import MODELS
from offload_triforce.model.shape import shape_of
from offload_triforce.planner import predict
from offload_triforce.planner.fit import DEVICE_OVERHEAD, HOST_OVERHEAD, footprint
from offload_triforce.planner.models import find_shape
from offload_triforce.planner.query import PlanQuery
from offload_triforce.planner.report import make_report
from offload_triforce.runtime.runtime import Runtime
from offload_triforce.scheduler.simulate import RoundTime
from tests.model.test_names import EXPECTED
from tests.tiny import FAMILIES, tiny_config, tiny_model

CONTEXT = 131072
A_ROUND = RoundTime(pass_s=1.0, step_s=0.01, draft_s=0.0, steps=5, tokens=10)
GB = 10**9
# Width, widest MLP, KV heads x head dimension of one layer, window of the sliding layers.
WIDTHS = {
    "SmolLM2-135M-Instruct": (576, 1536, 3 * 64, None),
    "Qwen2.5-Coder-1.5B-Instruct": (1536, 8960, 2 * 128, None),
    "Llama-2-7B-128K": (4096, 11008, 32 * 128, None),
    "Llama-3.1-8B": (4096, 14336, 8 * 128, None),
    "Llama-3.2-1B": (2048, 8192, 8 * 64, None),
    "Llama-3.2-3B": (3072, 8192, 8 * 128, None),
    "Qwen2.5-7B-1M": (3584, 18944, 4 * 128, None),
    "Qwen2.5-14B-1M": (5120, 13824, 8 * 128, None),
    "Qwen3-0.6B": (1024, 3072, 8 * 128, None),
    "Qwen3-4B-2507": (2560, 9728, 8 * 128, None),
    "Qwen3-8B": (4096, 12288, 8 * 128, None),
    "Qwen3-14B": (5120, 17408, 8 * 128, None),
    "Qwen3-32B": (5120, 25600, 8 * 128, None),
    "Qwen3-30B-A3B": (2048, 6144, 4 * 128, None),
    "Qwen3-30B-A3B-2507": (2048, 6144, 4 * 128, None),
    "Qwen3.6-27B": (5120, 17408, 4 * 256, None),
    "Qwen3.6-35B-A3B": (2048, 4 * 2048, 2 * 256, None),  # experts alone; what is assumed of them
    "Mistral-Nemo": (5120, 14336, 8 * 128, None),
    "Mistral-Small-24B": (5120, 32768, 8 * 128, None),
    "Mistral-Small-3.2-24B": (5120, 32768, 8 * 128, None),
    "Devstral-Small-24B": (5120, 32768, 8 * 128, None),
    "Seed-OSS-36B": (5120, 27648, 8 * 128, None),
    "Phi-3-mini-128K": (3072, 8192, 32 * 96, None),  # its window is larger than its context
    "Gemma-3-4B": (2560, 10240, 4 * 256, 1024),
    "Gemma-3-12B": (3840, 15360, 8 * 256, 1024),
    "Gemma-3-27B": (5376, 21504, 16 * 128, 1024),
}
# Whose layers have heads of two sizes, and whose weights come packed: ``tests/model/test_names.py`` counts these.
OTHERS = ("Gemma-4-31B", "gpt-oss-20b")
# 128 in all others.
HEAD_DIM = {"SmolLM2-135M-Instruct": 64, "Llama-3.2-1B": 64, "Phi-3-mini-128K": 96}
# Recurrent layers, their value heads and convolved channels; 16 key heads, and dimensions of 128.
RECURRENT = {"Qwen3.6-27B": (48, 48, 10240), "Qwen3.6-35B-A3B": (30, 32, 8192)}
# Sines and cosines of a token, where they are not two per dimension of a head: a quarter of it, and two kinds.
ROTARY = {"Qwen3.6-27B": 2 * 64, "Qwen3.6-35B-A3B": 2 * 64, "Gemma-3-27B": 4 * 128}
ROTARY |= dict.fromkeys(("Gemma-3-4B", "Gemma-3-12B"), 4 * 256)
FIXED = ("budget", "gamma", "gamma1", "resident", "hidden_states", "embeddings", "prefill_chunk")
_SHAPES = {}


def shape(name):
    if name not in _SHAPES:
        _SHAPES[name] = find_shape(name)
    return _SHAPES[name]


def group(name):
    """Tokens that are read at a time: fewer, where windows and states are kept to go back to."""
    return 8192 if name in RECURRENT or WIDTHS[name][3] else 32768


def kept_by_hand(name):
    """Bytes of windows or states after each group of a text, and at its end, up to 4 GiB."""
    _, _, kv, window = WIDTHS[name]
    layers, heads, channels = RECURRENT.get(name, (0, 0, 0))
    each = (window or 0) * 4 * kv * EXPECTED[name][3] + layers * (4 * heads * 128 * 128 + 3 * channels * 2)
    return min(2**32, 17 * each)


def by_hand(name, budget):
    """Bytes on the card, nothing resident, 192 draft tokens, 4 bits: a few products to redo with a pencil."""
    millions, token, full, sliding = EXPECTED[name]
    hidden, inner, kv, window = WIDTHS[name]
    layer_token = 4 * kv
    total = 2e6 * millions + DEVICE_OVERHEAD
    total += CONTEXT * layer_token + 2 * group(name) * hidden  # one layer's KV, and hidden states
    total += 2 * group(name) * ROTARY.get(name, 2 * HEAD_DIM.get(name, 128))
    total += 1024 * 2 * (3 * inner + 8 * hidden)
    if full:
        tile = 1 << int(min(16 * 2**20 / layer_token, CONTEXT / 4)).bit_length() - 1
        chosen = 0.32 * (budget - 72)  # 4 of 16 bits, and what scales them
        near = 72 + 8 + 49 + 2 * 192 + 13  # sink, recent window and a chunk; a pass' tokens; drafts, also ahead
        tail = tile + 72 + 49 + 49 + 193
        total += (chosen + near + tail) * token + 2**27  # and the ring
    if sliding:
        total += (1.25 * window + 193 + 2 * 192 + 13) * layer_token * sliding
    layers, heads, channels = RECURRENT.get(name, (0, 0, 0))
    total += layers * (4 * heads * 128 * 128 + 2 * 3 * channels * 2)
    total += layers * (193 + 2 * 192 + 13) * (4 * (16 * 128 + heads * (128 + 2)) + 2 * channels)  # a pass, and drafts
    return total


def models_and_cards():
    """Each model with all cards; the normal run takes a few for each, other ones for the next, the largest for all."""
    for number, name in enumerate(WIDTHS):
        few = [
            card
            for place, card in enumerate(CARDS)
            if (place - number) % 5 == 0 or card.gib == max(c.gib for c in CARDS)
        ]
        yield name, few
        yield pytest.param(name, CARDS, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "cards"), [*models_and_cards()], ids=lambda part: part if type(part) is str else len(part)
)
def test_every_model_on_every_card_by_hand(monkeypatch, name, cards):
    """Totals to 1 %; what is missing is what the card has less than that. How fast it is has tests of its own."""
    monkeypatch.setattr(predict, "walk_rounds", lambda *_, **__: A_ROUND)
    settings = Settings(budget=4096, wire="raw", tile=None, hidden_states="device", embeddings="device")
    used = footprint(shape(name), settings, CONTEXT)
    expected = by_hand(name, 4096)
    assert used.vram_bytes == pytest.approx(expected, rel=0.01)
    assert used.host_bytes - HOST_OVERHEAD == EXPECTED[name][1] * CONTEXT + kept_by_hand(name)
    for card in cards:
        asked = PlanQuery(shape(name), CONTEXT, of_card(card), settings, FIXED)
        found = make_report(asked)
        short = used.vram_bytes - card.gib * 2**30 * (0.92 if card.ecc else 0.975)
        assert bool(found.missing) == (short > 0), card.name
        if found.missing:
            assert found.missing[0]["bytes"] == pytest.approx(short, abs=1)
        assert (found.prediction is None) == bool(found.missing)


def test_all_models_are_there():
    assert list(EXPECTED) == [model.title for model in MODELS]
    assert list(WIDTHS) == [name for name in EXPECTED if name not in OTHERS]


def test_what_lies_in_host_memory_by_hand():
    """A million tokens of Qwen2.5-7B-1M: hidden states of 3,584 and a table of 152,064 rows, all in 16 bits."""
    settings, context = Settings(budget=4096, wire="raw", hidden_states="host"), 1 << 20
    used = footprint(shape("Qwen2.5-7B-1M"), settings, context)
    table = 152064 * 3584 * 2
    assert used.host["hidden states of the prompt"] == 32768 * 3584 * 2
    assert used.host["input embeddings"] == table
    assert used.prefill["hidden states"] == 3 * 1024 * 3584 * 2
    other = footprint(shape("Qwen2.5-7B-1M"), Settings(budget=4096, wire="raw", embeddings="device"), context)
    assert other.vram_bytes - used.vram_bytes == table + (32768 - 3 * 1024) * 3584 * 2
    assert used.host_bytes - other.host_bytes == table + 32768 * 3584 * 2


def test_embeddings_that_are_the_outputs_too_stay_on_the_card():
    tied = {name for name in EXPECTED if not shape(name).embedding}
    assert tied == {
        "SmolLM2-135M-Instruct",
        "Llama-3.2-1B",
        "Llama-3.2-3B",
        "Qwen3-0.6B",
        "Qwen3-4B-2507",
        "Gemma-3-4B",
        "Gemma-3-12B",
        "Gemma-3-27B",
        "Gemma-4-31B",
    }


def test_two_phases_by_hand():
    """Llama-3.1-8B at 128K: what the prefill held, 0.97 GB, is given to tiles of a cache of 17.2 GB."""
    found = make_report(PlanQuery(shape("Llama-3.1-8B"), CONTEXT, of_card(find_card("RTX 4090")), Settings(wire="raw")))
    used, settings = found.used, found.settings
    prefill = CONTEXT * 8 * 128 * 4 + 32768 * (4096 * 2 + 2 * 128 * 2) + 1024 * 2 * (3 * 14336 + 8 * 4096)
    assert sum(used.prefill.values()) == prefill
    taken = sum(used.decoding.values()) - used.plan.late_bytes
    assert taken < 0.25e9, "a pass has activations and logits"
    assert used.plan.late_bytes == pytest.approx(prefill - taken, rel=0.03)
    assert settings.resident >= 0.4
    assert settings.resident - settings.prefill_resident == pytest.approx(used.plan.late_bytes / 17.18e9, abs=0.002)
    assert used.vram_bytes == max(used.prefill_bytes, used.decoding_bytes) < found.question.machine.memory
    assert used.prefill_bytes == pytest.approx(used.decoding_bytes, rel=0.002), "neither leaves anything unused"


WAYS = [{}, {"prefill_resident": 0.1, "hidden_states": "host"}, {"prefill_resident": 0.0}]


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral-sliding", "qwen3-moe"])
@pytest.mark.parametrize("context", [700, 1500])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_planned_bytes_are_those_that_a_runtime_allocates(family, context, way):
    """Within 2 %, counting the bytes of every tensor that the caches hold."""
    sizes = {"budget": 128, "tile": 64, "ring": 3, "chunk": 4, "sink": 4, "recent": 16, "gamma": 6}
    settings = Settings(**sizes, resident=0.3, link_gbps=100.0, **way)  # with a link, so that there is a ring
    model = tiny_model(family)
    prefix, changes = FAMILIES[family]
    planned = footprint(shape_of(tiny_config(prefix, **changes), torch.float32), settings, context)
    runtime = Runtime(model, probe(model), settings, context)
    try:
        caches, device, host = runtime.caches, 0, 0
        if caches.window is not None:
            device += caches.window.kv.nbytes + caches.window.drafts.kv.nbytes
        if caches.full is not None:
            stream = caches.full.stream
            host = sum(tile.nbytes for tile in stream.store._places.values()) - stream.store._resident.nbytes
            parts = (stream.store._resident, stream._ring._memory, caches.full.tail.kv)
            retrieval = caches.retrieval
            parts += (retrieval.kv, retrieval.chosen, retrieval.scores, retrieval.held)
            parts += tuple(retrieval.store.coded)
            stream.store.bring_up(0)
            late = sum(tile.nbytes for tile in stream.store.late._room.values())
            assert planned.decoding.get("more resident tiles", 0) == late
            assert bool(late) == bool(way)
            device += sum(part.nbytes for part in parts)
    finally:
        runtime.close()
    caches = {part: size for part, size in planned.held.items() if part not in ("weights", "CUDA itself")}
    assert sum(caches.values()) == pytest.approx(device, rel=0.02)
    waiting = sum(piece.nbytes for piece in runtime.states._pieces) if runtime.states else 0
    assert planned.host.get("hidden states of the prompt", 0) == waiting
    assert planned.host["tiles of the full cache"] == host
    table = planned.host.get("input embeddings", 0)
    assert planned.held["weights"] + table == sum(weight.nbytes for weight in model.parameters())


def test_a_draft_model_takes_its_weights_and_its_cache():
    small = shape("Llama-3.1-8B")
    target = shape("Llama-3.1-8B")
    settings = Settings(draft_cache=512, wire="raw")
    bare = footprint(target, settings, CONTEXT).vram_bytes
    other = find_shape("llama-3.1-8b")
    assert footprint(target, settings, CONTEXT, other).vram_bytes - bare == small.weights.total + 512 * 131072
    assert footprint(target, settings, CONTEXT, target).vram_bytes - bare == 512 * 131072
