"""What is read from a configuration: hand counts, and the runtime itself."""

import importlib.util

import pytest
import torch

from offload_triforce.errors import InputError, UnsupportedModelError
from offload_triforce.model.blank import layout_of
from offload_triforce.model.layout import probe
from offload_triforce.model.loader import load_model
from offload_triforce.model.shape import shape_of, shape_of_loaded
from offload_triforce.planner.models import find_shape
from tests.byte_tokenizer import save_tiny_llama
from tests.packed import bytes_taken
from tests.tiny import FAMILIES, tiny_config, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_configuration_says_what_the_runtime_finds_in_the_model(family):
    """The planner must not have a description of its own: layout and bytes are those of the loaded model."""
    model = tiny_model(family)
    found = probe(model)
    prefix, changes = FAMILIES[family]
    shape = shape_of(tiny_config(prefix, **changes), torch.float32)
    assert shape.layout.layers == found.layers
    assert shape.layout.max_positions == found.max_positions
    assert shape.layout.vocabulary == found.vocabulary
    assert shape.weights.total == sum(weight.nbytes for weight in model.parameters())
    assert shape.weights == shape_of_loaded(model, found).weights


def test_weights_by_part_add_up():
    shape = find_shape("qwen3-30b-a3b")
    weights, layers = shape.weights, len(shape.layout.layers)
    inside = layers * (weights.layer + weights.experts)
    embedding, norm = weights.head, 2 * 2048
    assert inside + weights.head + embedding + norm == weights.total
    assert weights.expert_share == 8 / 128
    assert layers * weights.experts == 2 * 48 * 128 * 3 * 2048 * 768


def test_nf4_and_int8_by_hand():
    """Llama-2-7B: 32 layers of 4 x 4096^2 + 3 x 4096 x 11008 packed weights; the rest keeps 16 bits.

    nf4 takes 4 bits, 8 for each 64 and 32 for each 64 x 256 of them, and tables of 273 numbers for each matrix.
    """
    shape = find_shape("llama-2-7b-128k")
    packed = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    rest = 2 * (2 * 32000 * 4096 + 65 * 4096)
    assert shape.quantized("nf4").weights.total == packed * (4 + 1 / 8 + 1 / 512) / 8 + 32 * 7 * 4 * 273 + rest
    rows = 32 * (4 * 4096 + 2 * 11008 + 4096)
    assert shape.quantized("int8").weights.total == packed + 4 * rows + rest


def test_experts_stay_as_they_are_under_nf4():
    shape = find_shape("qwen3-30b-a3b")
    assert shape.quantized("nf4").weights.experts == shape.weights.experts


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_packed_bytes_are_those_that_bitsandbytes_takes(tmp_path, quantize):
    folder = str(save_tiny_llama(tmp_path))
    model, _ = load_model(folder, torch.bfloat16, torch.device("cpu"), quantize)
    planned = find_shape(folder).quantized(quantize).weights
    assert planned.total == pytest.approx(bytes_taken(model), rel=0.01)
    assert shape_of_loaded(model, probe(model)).weights == planned


def test_what_is_not_decoded_is_refused():
    config = tiny_config("Llama")
    for changes, feature in (
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"is_causal": False}, "both directions"),
    ):
        other = tiny_config("Llama")
        for name, value in changes.items():
            object.__setattr__(other, name, value)
        with pytest.raises(UnsupportedModelError, match=feature):
            layout_of(other, torch.float32)
    with pytest.raises(InputError, match="nf4 or int8"):
        shape_of(config, quantize="fp8")
    object.__setattr__(config, "num_attention_heads", None)
    with pytest.raises(InputError, match=r"the configuration makes no LlamaForCausalLM$"):
        shape_of(config)
