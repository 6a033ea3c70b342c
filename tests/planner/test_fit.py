"""Sizes: every known model on every known card by hand, and tiny models against what a runtime really allocates."""

import pytest
import torch

from offload_triforce.config import Settings
from offload_triforce.machine.cards import CARDS
from offload_triforce.machine.hardware import of_card
from offload_triforce.model.layout import probe
from offload_triforce.model.names import MODELS
from offload_triforce.model.shape import shape_of
from offload_triforce.planner.fit import DEVICE_OVERHEAD, HOST_OVERHEAD, footprint
from offload_triforce.planner.models import find_shape
from offload_triforce.planner.query import PlanQuery
from offload_triforce.planner.report import make_report
from offload_triforce.runtime.runtime import Runtime
from tests.model.test_names import EXPECTED
from tests.tiny import FAMILIES, tiny_config, tiny_model

CONTEXT = 131072
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
    "Mistral-Nemo": (5120, 14336, 8 * 128, None),
    "Devstral-Small-24B": (5120, 32768, 8 * 128, None),
    "Seed-OSS-36B": (5120, 27648, 8 * 128, None),
    "Phi-3-mini-128K": (3072, 8192, 32 * 96, None),  # its window is larger than its context
    "Gemma-3-4B": (2560, 10240, 4 * 256, 1024),
    "Gemma-3-12B": (3840, 15360, 8 * 256, 1024),
    "Gemma-3-27B": (5376, 21504, 16 * 128, 1024),
}
# 128 in all others.
HEAD_DIM = {"SmolLM2-135M-Instruct": 64, "Llama-3.2-1B": 64, "Phi-3-mini-128K": 96}
HEAD_DIM |= {"Gemma-3-4B": 256, "Gemma-3-12B": 256}
_SHAPES = {}


def shape(name):
    if name not in _SHAPES:
        _SHAPES[name] = find_shape(name)
    return _SHAPES[name]


def by_hand(name, budget):
    """Bytes on the card, nothing resident, 192 draft tokens, 4 bits: a few products to redo with a pencil."""
    millions, token, full, sliding = EXPECTED[name]
    hidden, inner, kv, window = WIDTHS[name]
    layer_token = 4 * kv
    total = 2e6 * millions + DEVICE_OVERHEAD
    total += CONTEXT * layer_token + 2 * CONTEXT * hidden  # one layer's KV, and hidden states
    total += 2 * 2 * CONTEXT * HEAD_DIM.get(name, 128)  # sines and cosines
    total += 1024 * 2 * (3 * inner + 8 * hidden)
    if full:
        tile = 1 << int(min(16 * 2**20 / layer_token, CONTEXT / 4)).bit_length() - 1
        chosen = 0.32 * (budget - 72)  # 4 of 16 bits, and what scales them
        near = 72 + 8 + 49 + 2 * 192 + 13  # sink, recent window and a chunk; a pass' tokens; drafts, also ahead
        tail = tile + 72 + 49 + 49 + 193
        total += (chosen + near + tail) * token + 2**27  # and the ring
    if sliding:
        total += (1.25 * window + 193 + 2 * 192 + 13) * layer_token * sliding
    return total


@pytest.mark.parametrize("name", EXPECTED)
def test_every_model_on_every_card_by_hand(name):
    """Totals to 1 %; what is missing is what the card has less than that."""
    settings = Settings(budget=4096, tile=None)
    used = footprint(shape(name), settings, CONTEXT)
    expected = by_hand(name, 4096)
    assert used.vram_bytes == pytest.approx(expected, rel=0.01)
    assert used.host_bytes - HOST_OVERHEAD == EXPECTED[name][1] * CONTEXT
    for card in CARDS:
        asked = PlanQuery(shape(name), CONTEXT, of_card(card), settings, ("budget", "gamma", "gamma1", "resident"))
        found = make_report(asked)
        short = used.vram_bytes - card.gib * 2**30 * (0.92 if card.ecc else 0.975)
        assert bool(found.missing) == (short > 0), card.name
        if found.missing:
            assert found.missing[0]["bytes"] == pytest.approx(short, abs=1)
            assert found.prediction is None


def test_all_models_are_there():
    assert list(WIDTHS) == list(EXPECTED) == [model.title for model in MODELS]


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral-sliding", "qwen3-moe"])
@pytest.mark.parametrize("context", [700, 1500])
def test_planned_bytes_are_those_that_a_runtime_allocates(family, context):
    """Within 5 %, counting the bytes of every tensor that the caches hold."""
    settings = Settings(budget=128, tile=64, ring=3, chunk=4, sink=4, recent=16, gamma=6, resident=0.3)
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
            parts = (stream.store._resident, stream._ring, caches.full.tail.kv)
            retrieval = caches.retrieval
            parts += (retrieval.kv, retrieval.chosen, retrieval.scores, retrieval.held)
            parts += tuple(retrieval.store.coded)
            device += sum(part.nbytes for part in parts)
    finally:
        runtime.close()
    beside = ("weights", "CUDA itself")
    caches = {k: v for k, v in planned.device.items() if k not in beside and not k.startswith("prefill")}
    assert sum(caches.values()) == pytest.approx(device, rel=0.05)
    assert planned.host["tiles of the full cache"] == host
    assert planned.device["weights"] == sum(weight.nbytes for weight in model.parameters())


def test_a_draft_model_takes_its_weights_and_its_cache():
    small = shape("Llama-3.1-8B")
    target = shape("Llama-3.1-8B")
    settings = Settings(draft_cache=512)
    bare = footprint(target, settings, CONTEXT).vram_bytes
    other = find_shape("llama-3.1-8b")
    assert footprint(target, settings, CONTEXT, other).vram_bytes - bare == small.weights.total + 512 * 131072
    assert footprint(target, settings, CONTEXT, target).vram_bytes - bare == 512 * 131072
