"""The table of models and what is read from a configuration: hand counts, published numbers, the runtime itself."""

import importlib.util

import pytest
import torch

from offload_triforce.errors import InputError, UnsupportedModelError
from offload_triforce.model.layout import probe
from offload_triforce.model.loader import load_model
from offload_triforce.model.shape import layout_of, shape_of, weigh
from offload_triforce.planner.models import MODELS, find_config
from tests.byte_tokenizer import save_tiny_llama
from tests.tiny import FAMILIES, tiny_config, tiny_model

# Published number of parameters (of the files on the hub, in millions), KV bytes per token in 16 bits (full layers
# alone), and the numbers of full and sliding layers. KV by hand: 2 x 2 bytes x KV heads x head dimension x layers.
EXPECTED = {
    "Llama-2-7B-128K": (6738, 4 * 32 * 128 * 32, 32, 0),
    "Llama-3.1-8B": (8030, 4 * 8 * 128 * 32, 32, 0),
    "Qwen2.5-7B-1M": (7616, 4 * 4 * 128 * 28, 28, 0),
    "Qwen3-8B": (8191, 4 * 8 * 128 * 36, 36, 0),
    "Qwen3-14B": (14768, 4 * 8 * 128 * 40, 40, 0),
    "Qwen3-32B": (32762, 4 * 8 * 128 * 64, 64, 0),
    "Qwen3-30B-A3B": (30532, 4 * 4 * 128 * 48, 48, 0),
    "Mistral-Nemo": (12248, 4 * 8 * 128 * 40, 40, 0),
    "Phi-3-mini-128K": (3821, 4 * 32 * 96 * 32, 32, 0),
    "Gemma-3-4B": (4300, 4 * 4 * 256 * 5, 5, 29),
    "Gemma-3-12B": (12187, 4 * 8 * 256 * 8, 8, 40),
    "Gemma-3-27B": (27432, 4 * 16 * 128 * 10, 10, 52),
}


def test_all_models_are_expected():
    assert [model.name for model in MODELS] == list(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_the_table_against_published_numbers(name):
    millions, token, full, sliding = EXPECTED[name]
    shape = shape_of(find_config(name)[1], name=name)
    layout = shape.layout
    assert shape.weights.parameters / 1e6 == pytest.approx(millions, rel=2e-4)
    assert shape.weights.total == 2 * shape.weights.parameters
    assert sum(layout.token_bytes(i) for i in layout.full) == token
    assert (len(layout.full), len(layout.sliding)) == (full, sliding)


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
    assert shape.weights == weigh(model, None)


def test_weights_by_part_add_up():
    shape = shape_of(find_config("Qwen3-30B-A3B")[1])
    weights, layers = shape.weights, len(shape.layout.layers)
    inside = layers * (weights.layer + weights.experts)
    embedding, norm = weights.head, 2 * 2048
    assert inside + weights.head + embedding + norm == weights.total
    assert weights.expert_share == 8 / 128
    assert layers * weights.experts == 2 * 48 * 128 * 3 * 2048 * 768


def test_nf4_and_int8_by_hand():
    """Llama-2-7B: 32 layers of 4 x 4096^2 + 3 x 4096 x 11008 packed weights; the rest keeps 16 bits."""
    config = find_config("Llama-2-7B-128K")[1]
    packed = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    rest = 2 * (2 * 32000 * 4096 + 65 * 4096)
    assert shape_of(config, quantize="nf4").weights.total == packed * 4.5 / 8 + rest
    rows = 32 * (4 * 4096 + 2 * 11008 + 4096)
    assert shape_of(config, quantize="int8").weights.total == packed + 4 * rows + rest


def test_experts_stay_as_they_are_under_nf4():
    config = find_config("Qwen3-30B-A3B")[1]
    assert shape_of(config, quantize="nf4").weights.experts == shape_of(config).weights.experts


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_packed_bytes_are_those_that_bitsandbytes_takes(tmp_path, quantize):
    folder = str(save_tiny_llama(tmp_path))
    model, _ = load_model(folder, torch.bfloat16, torch.device("cpu"), quantize)
    taken = 0
    for weight in model.parameters():
        state = getattr(weight, "quant_state", None)
        taken += weight.nbytes + (0 if state is None else state.absmax.nbytes)
        scale = getattr(weight, "SCB", None)
        taken += 0 if scale is None else scale.nbytes
    planned = shape_of(find_config(folder)[1], quantize=quantize).weights.total
    assert planned == pytest.approx(taken, rel=0.01)


def test_what_is_not_decoded_is_refused():
    config = tiny_config("Llama")
    for changes, feature in (
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"kv_lora_rank": 512}, "MLA"),
        ({"num_attention_heads": None}, "attention heads"),
    ):
        other = tiny_config("Llama")
        for name, value in changes.items():
            object.__setattr__(other, name, value)
        with pytest.raises(UnsupportedModelError, match=feature):
            layout_of(other, torch.float32)
    with pytest.raises(InputError, match="nf4 or int8"):
        shape_of(config, quantize="fp8")
