"""Layer-major prefill: the keys and values of a plain forward, each moved once, and no trace left on the model."""

from functools import cache

import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from offload_triforce import Settings
from offload_triforce.model.adapter import attached
from offload_triforce.model.layout import probe
from offload_triforce.model.prefill import AttentionPart, prefill
from offload_triforce.model.recording import Stretch, record
from offload_triforce.planner.sizes import rotary_numbers
from offload_triforce.runtime.runtime import Runtime
from offload_triforce.runtime.session import Session
from tests.tiny import FAMILIES, RECURRENT, prompt_ids, tiny_model
from tests.usual import sampled

TOKENS = 150


@cache
def model_of(family):
    return tiny_model(family, calm=True)


@cache
def plain_kv(family):
    """What transformers' own forward caches, all but the last token: [2, K, n, D] per layer."""
    # Without a config, sliding layers keep everything too.
    seen = DynamicCache(config=model_of(family).config) if family in RECURRENT else DynamicCache()
    with torch.no_grad():
        model_of(family)(prompt_ids(TOKENS + 1), past_key_values=seen, use_cache=True)
    layers = enumerate(seen.layers)
    found = {i: torch.cat([layer.keys, layer.values])[:, :, :TOKENS] for i, layer in layers if hasattr(layer, "keys")}
    if family == "gemma4-shared":  # its last two layers read what the second has made
        found |= {3: found[1], 4: found[1]}
    return found


def run_prefill(model, chunk, queries=16, tokens=TOKENS, **kwargs):
    """What is handed on for each layer that attends, (layer, KV, queries, rule, address of the KV)."""
    done = []

    def layer_done(layer, part):
        if isinstance(part, AttentionPart):
            kv, queries, params = part
            done.append((layer, kv.clone(), queries, params, kv.data_ptr()))

    with attached(model):
        prefill(model, probe(model), prompt_ids(TOKENS + 1)[0, :tokens], chunk, queries, layer_done, **kwargs)
    return done


@pytest.mark.parametrize(("family", "chunk"), sampled([*FAMILIES], [1, 7, 64, 1000], share=2))
def test_equals_plain_forward(family, chunk):
    done = run_prefill(model_of(family), chunk)
    expected = plain_kv(family)
    assert [layer for layer, *_ in done] == list(expected)
    for (_, kv, *_), reference in zip(done, expected.values(), strict=True):
        # A state that is carried from chunk to chunk rounds otherwise, and so do keys that are normalised.
        limit = 1e-4 if family in RECURRENT or family.startswith("gemma4") else 1e-5
        torch.testing.assert_close(kv, reference, rtol=limit, atol=limit)


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_one_buffer_for_all_layers(family):
    """Only one layer's KV is on the device at a time: every layer is handed on in the same memory."""
    assert len({address for *_, address in run_prefill(model_of(family), 64)}) == 1


@pytest.mark.parametrize(
    ("family", "kept"), [("gemma4", set()), ("gemma4-shared", {"sliding_attention", "full_attention"})]
)
def test_keys_and_values_for_later_layers_are_kept_where_one_reads_them(family, kept):
    """Gemma 4 hands them on whether anybody reads them or not: they would fill the device."""
    model, found = model_of(family), []

    def look(_, args, kwargs):
        found.append(set(kwargs["shared_kv_states"].keys()))

    hook = model.model.layers[-1].register_forward_pre_hook(look, with_kwargs=True)
    try:
        run_prefill(model, 64)
    finally:
        hook.remove()
    assert len(found) > 2
    assert all(names == kept for names in found[-2:])


def test_newest_queries():
    """They choose the first chunks of the retrieval cache; they are the same however the prompt was cut."""
    at_once = run_prefill(model_of("llama"), 1000, queries=5)
    for chunk in (2, 50, 145, 148):  # the last chunk may be shorter than what is wanted
        other = run_prefill(model_of("llama"), chunk, queries=5)
        for (_, _, queries, params, _), (_, _, expected, _, _) in zip(other, at_once, strict=True):
            assert queries.shape == (5, 5, 12)
            assert params.scaling == pytest.approx(12**-0.5)
            torch.testing.assert_close(queries, expected, rtol=1e-4, atol=1e-4)


def test_progress_counts_every_step():
    steps = []
    run_prefill(model_of("llama"), 64, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(i, 9) for i in range(1, 10)]  # 3 chunks through 3 layers


@pytest.fixture
def llama():
    """A model of its own, with an instance attribute on one layer as accelerate sets it."""
    model = tiny_model("llama")
    layer = model.model.layers[1]
    original = layer.forward
    layer.calls = 0

    def hooked(*args, **kwargs):
        layer.calls += 1
        return original(*args, **kwargs)

    layer.forward = hooked
    return model


class Stop(Exception):
    pass


def stop(*args):
    raise Stop


def assert_untouched(model, hooked, before):
    assert model.config._attn_implementation == "sdpa"
    assert ["forward" in vars(layer) for layer in model.model.layers] == [False, True, False]
    assert vars(model.model.layers[1])["forward"] is hooked
    with torch.no_grad():
        assert torch.equal(model(prompt_ids(40)).logits, before)


@pytest.mark.parametrize("where", ["nowhere", "between two layers", "while arguments are recorded", "layer done"])
def test_forward_is_put_back(llama, where):
    """Whatever happens in between; and a forward that somebody else had set runs in the replay."""
    hooked = llama.model.layers[1].forward
    with torch.no_grad():
        before = llama(prompt_ids(40)).logits
    llama.model.layers[1].calls = 0
    handle = None
    if where == "nowhere":
        run_prefill(llama, 64)
        assert llama.model.layers[1].calls == 3 + 1  # chunks, and the probe
    elif where == "between two layers":
        with pytest.raises(Stop):
            run_prefill(llama, 64, progress=lambda done, total: stop() if done == 5 else None)
    elif where == "while arguments are recorded":
        layout = probe(llama)
        handle = llama.model.norm.register_forward_pre_hook(stop)
        with pytest.raises(Stop), attached(llama):
            prefill(llama, layout, prompt_ids(TOKENS)[0], 64, 16, stop)
        handle.remove()
    else:
        layout = probe(llama)
        with pytest.raises(Stop), attached(llama):
            prefill(llama, layout, prompt_ids(TOKENS)[0], 64, 16, stop)
    assert_untouched(llama, hooked, before)


@pytest.mark.parametrize("family", ["llama", "qwen2-sliding", "gemma3", "mistral-sliding"])
@pytest.mark.parametrize("resident", [0.0, 0.4, 1.0])
def test_every_byte_crosses_the_link_once(family, resident):
    """Whole tiles go to the host; nothing comes back, and the tail and sliding layers stay."""
    model = model_of(family)
    layout = probe(model)
    settings = Settings(
        chunk=4,
        sink=4,
        recent=8,
        tile=16,
        gamma=3,
        prefill_chunk=33,
        draft_cache=64,
        resident=resident,
        link_gbps=1000.0,
    )
    runtime = Runtime(model, layout, settings, 200)
    try:
        with attached(model):
            Session(runtime).begin(prompt_ids(TOKENS + 1)[0, :TOKENS])
        # The newest 8 + 4 + 4 tokens stay in the tail: (150 - 16) // 16 tiles.
        full, tiles = len(layout.full), 8
        moved = [runtime.device.incoming.moved, runtime.device.outgoing.moved]
        if not full:
            assert moved == [0, 0]
            return
        store = runtime.caches.full.stream.store
        host = sum(not store.plan.is_resident(layer, tile) for layer in range(full) for tile in range(tiles))
        assert runtime.caches.full.tiles == tiles
        assert moved == [0, host * store.plan.tile_bytes]
        assert runtime.link_bytes == host * store.plan.tile_bytes
        for index, layer in enumerate(layout.full):
            kv = runtime.caches.full.read(index)
            torch.testing.assert_close(kv, plain_kv(family)[layer], rtol=1e-5, atol=1e-5)
    finally:
        runtime.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_sines_and_cosines_are_those_that_are_planned(family):
    """Beside the hidden states, what is kept of each token from layer to layer, each tensor once."""
    model, tokens = model_of(family), prompt_ids(64)[0]
    with attached(model), torch.no_grad():
        _, calls = record(model, Stretch(probe(model), tokens, 0, len(tokens)), slice(0, 64))
    kept = {}
    for call in calls:
        for tensor in tree_leaves((call.args, call.kwargs)):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                assert tensor.shape[-2] == 64
                kept[tensor.data_ptr()] = tensor.numel() // 64
    config, layout = model.config.get_text_config(), probe(model)
    planned = rotary_numbers(config, layout)
    planned += (getattr(config, "hidden_size_per_layer_input", None) or 0) * len(layout.layers)
    halves = 2 if family == "gpt-oss" else 1  # keeps each angle once, where others write it down for both halves
    assert halves * sum(kept.values()) == planned
