"""Looking on while a model runs: layers that a prefill could not drive, and masks that nobody builds while decoding."""

import inspect
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import masking_utils

from offload_triforce import TriForce, UnsupportedModelError
from offload_triforce.model.layout import probe
from offload_triforce.model.watch import PROBE_NAME, PROBE_TOKENS, LayerWatch, masks_asked_for, window_of
from tests.tiny import FAMILIES, tiny_model

CAUSAL = masking_utils.causal_mask_function
SLIDING = masking_utils.sliding_window_causal_mask_function


class Add(nn.Module):
    """A decoder layer as it should be."""

    def forward(self, states, position_ids=None):
        return states + 1


def states(*shape):
    return torch.zeros(shape or (1, PROBE_TOKENS, 8))


def in_order(layers, x):
    for layer in layers:
        x = layer(x, position_ids=torch.arange(PROBE_TOKENS))
    return x


class WithWeights(Add):
    def forward(self, states, position_ids=None):
        return states + 1, None


class Narrowing(Add):
    def forward(self, states, position_ids=None):
        return states[..., :4]


def changed(layers, x):
    return layers[1](layers[0](x) * 2)


def twice(layers, x):
    return layers[1](layers[1](layers[0](x)))


def one_only(layers, x):
    return layers[0](x)


def by_name(layers, x):
    for layer in layers:
        x = layer(states=x)
    return x


# The layers, how they are run, on what, and the end of the sentence about it.
STRANGE = {
    "another order": (Add, lambda layers, x: in_order(layers[::-1], x), states(), "once each, one after the other"),
    "twice": (Add, twice, states(), "once each, one after the other"),
    "one only": (Add, one_only, states(), "does not run all of its decoder layers"),
    "something in between": (Add, changed, states(), "changes the hidden states between its decoder layers"),
    "by name": (Add, by_name, states(), "does not hand its decoder layers hidden states"),
    "AltUp": (Add, in_order, states(4, 1, PROBE_TOKENS, 8), "does not hand its decoder layers hidden states"),
    "a tuple": (WithWeights, lambda layers, x: layers[1](layers[0](x)[0]), states(), "something else than hidden"),
    "narrower": (Narrowing, in_order, states(), "something else than hidden states"),
}


@pytest.mark.parametrize(("kind", "run", "x", "words"), STRANGE.values(), ids=STRANGE)
def test_layers_that_cannot_be_driven(kind, run, x, words):
    layers = nn.ModuleList([kind(), kind()])
    look = LayerWatch(layers)
    with look.looking():
        run(layers, x)
    assert words in look.problem
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)


def test_layers_as_they_should_be():
    layers = nn.ModuleList([Add(), Add()])
    look, x = LayerWatch(layers), states()
    with look.looking():
        assert torch.equal(in_order(layers, x), x + 2)
    assert look.problem is None
    assert [tensor.shape for tensor in look.inputs] == [x.shape, (PROBE_TOKENS,)]


def test_hooks_are_gone_after_a_failure():
    layers = nn.ModuleList([Add(), Add()])
    with pytest.raises(KeyError), LayerWatch(layers).looking():
        raise KeyError
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)


def test_what_the_whole_model_does_to_its_tokens_is_seen():
    """The prefill gives them to the decoder alone."""
    model = tiny_model()
    scale = 1.0
    whole = model.forward

    def scaled(input_ids, **kwargs):
        return whole(inputs_embeds=scale * model.get_input_embeddings()(input_ids), **kwargs)

    scaled.__signature__ = inspect.signature(whole)
    model.forward = scaled
    assert len(probe(model).layers) == 3
    scale = 1.5
    with pytest.raises(UnsupportedModelError, match="its decoder alone does not read tokens as the whole model does"):
        probe(model)


@given(st.integers(1, 5000), st.lists(st.integers(1, 5000), max_size=3))
def test_a_sliding_window_is_found_among_others(window, others):
    assert window_of(SLIDING(window), {None, window, *others}) == window
    assert window_of(CAUSAL, {None, window, *others}) is None


def test_what_another_thread_does_meanwhile_is_its_own_affair():
    """It reads longer texts, with no keyword of ours: nothing of that is a problem, and none of it is recorded."""
    model, ids = tiny_model(), torch.arange(7)[None]
    watch = LayerWatch(model.get_decoder().layers)
    with watch.looking():
        for tokens in (ids, ids[:, :PROBE_TOKENS]):
            other = threading.Thread(target=model, args=(tokens,))
            other.start()
            other.join()
        assert watch.inputs == []
        model.get_decoder()(ids[:, :PROBE_TOKENS], use_cache=False)
    assert watch.problem is None
    assert watch.inputs[0].shape == (1, PROBE_TOKENS, model.config.hidden_size)


OTHERS = {
    "bidirectional": masking_utils.bidirectional_mask_function,
    "another window": SLIDING(23),
    "chunks": masking_utils.chunked_causal_mask_function(24, torch.zeros(1, dtype=torch.long)),
    "a prefix that sees itself": masking_utils.or_masks(CAUSAL, lambda batch, head, query, key: key < 9),
    "not the first": masking_utils.and_masks(CAUSAL, lambda batch, head, query, key: key > 0),
    "images that see themselves": masking_utils.or_masks(
        CAUSAL, lambda batch, head, query, key: torch.zeros(1, PROBE_TOKENS)[batch, key] == 0
    ),
    "one that needs more": lambda batch, head, query, key: {}[key],
}


@pytest.mark.parametrize("mask", OTHERS.values(), ids=OTHERS)
def test_other_masks_are_none_of_them(mask):
    with pytest.raises(ValueError, match="neither causal nor one of a sliding window"):
        window_of(mask, {None, 24})


def test_a_rule_that_looks_at_the_tokens_is_tried_on_these():
    """Of text alone there is nothing that sees itself in both directions."""
    blocks = torch.full((1, PROBE_TOKENS), -1)

    def inside(batch, head, query, key):
        return (blocks[batch, query] == blocks[batch, key]) & (blocks[batch, query] >= 0)

    assert window_of(masking_utils.or_masks(CAUSAL, inside), {None, 24}) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_that_families_ask_for(family):
    """Each has a window that its layers were told of, or none. The probe's own are not mixed up with others."""
    model = tiny_model(family)
    with masks_asked_for() as masks:
        layout = probe(model)
        assert masks == []
        model.set_attn_implementation(PROBE_NAME)
        with pytest.raises(UnsupportedModelError, match="without a cache"):
            model(torch.zeros(1, 2, dtype=torch.long))
    known = {None, *(layer.window for layer in layout.attention)}
    assert masks
    assert {window_of(mask, known) for mask in masks} <= known


def test_a_mask_of_its_own_is_refused(monkeypatch):
    """Bidirectional attention that no field of the configuration tells of."""
    model = tiny_model()
    build = masking_utils.create_causal_mask

    def first_two(batch, head, query, key):
        return key < 2

    name = "transformers.models.llama.modeling_llama.create_causal_mask"
    monkeypatch.setattr(name, lambda **given: build(**given, or_mask_function=first_two))
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM masks its attention by a rule of its own"):
        TriForce(model)


def test_a_window_in_the_mask_alone_is_refused(monkeypatch):
    model = tiny_model()
    model.config.sliding_window, model.config.use_sliding_window = 24, False
    name = "transformers.models.llama.modeling_llama.create_causal_mask"
    monkeypatch.setattr(name, masking_utils.create_sliding_window_causal_mask)
    with pytest.raises(UnsupportedModelError, match="a sliding window in its mask that its attention function is not"):
        TriForce(model)
