"""What a configuration alone gives away: refused by the same sentence wherever it is met, and listed in one place."""

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from benchmarks.tiny_families import model_types, tiny_config
from offload_triforce.errors import UnsupportedModelError
from offload_triforce.model import refusals
from offload_triforce.model.blank import layout_of
from offload_triforce.model.refusals import class_name, refuse, refuse_unloadable


def sentence(config, check=refuse):
    with pytest.raises(UnsupportedModelError) as error:
        check(config)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 300
    return message


# What a configuration says, and what the user is told.
SAID = {
    "encoder-decoder": ("bart", {}, "BartForCausalLM is an encoder-decoder"),
    "an encoder-decoder of several parts": ("musicgen", {}, "MusicgenForCausalLM is an encoder-decoder"),
    "is_causal": ("llama", {"is_causal": False}, "LlamaForCausalLM attends in both directions (is_causal is False)"),
    "Gemma": ("gemma", {"use_bidirectional_attention": True}, "(use_bidirectional_attention is True)"),
    "Gemma 2": ("gemma2", {"use_bidirectional_attention": True}, "(use_bidirectional_attention is True)"),
    "Gemma 3": ("gemma3_text", {"use_bidirectional_attention": True}, "(use_bidirectional_attention is True)"),
    "Gemma 3 with eyes": ("gemma3", {"use_bidirectional_attention": True}, "(use_bidirectional_attention is True)"),
    "Gemma 4": ("gemma4_text", {"use_bidirectional_attention": "all"}, "(use_bidirectional_attention is 'all')"),
    "dynamic NTK": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "uses dynamic NTK rotary scaling",
    ),
    "a state space": ("mamba", {}, "has 4 of 4 layers of type 'linear_attention' (a recurrent state"),
    "linear attention": ("minimax", {}, "MiniMaxForCausalLM has 2 of 4 layers of type 'linear_attention'"),
    "convolutions": ("lfm2", {"layer_types": ["conv", "full_attention"] * 2}, "of type 'conv' (short convolutions)"),
    "chunks": ("llama4_text", {}, "of type 'chunked_attention' (attention within chunks"),
    "AltUp": ("gemma3n_text", {}, "Gemma3nForCausalLM keeps several hidden states per token (AltUp)"),
    "AltUp, with eyes and ears": ("gemma3n", {}, "Gemma3nForConditionalGeneration keeps several hidden states"),
    "a draft head": ("gemma4_unified_assistant", {}, "is a draft head that reads the keys and values of another model"),
    "dynamic masks": ("doge", {}, "DogeForCausalLM masks its attention by what the values say"),
    "indexer, DeepSeek-V3.2": ("deepseek_v32", {}, "(sparse attention through an indexer)"),
    "indexer, GLM": ("glm_moe_dsa", {}, "(sparse attention through an indexer)"),
    "indexer, Hunyuan": ("hy_v4", {}, "(sparse attention through an indexer)"),
    "indexer, AXK2": ("axk2", {}, "(sparse attention through an indexer)"),
    "indexer, Qwen4": ("qwen4_exp_text", {"layer_types": ["indexed_attention"] * 4}, "through an indexer)"),
}


def config_of(model_type, changes):
    if model_type not in transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    try:
        return tiny_config(model_type, **changes)
    except Exception as error:  # older releases know fewer settings, and refuse the rest in many ways
        if transformers.__version__ >= "5.24":
            raise
        pytest.skip(f"transformers {transformers.__version__} makes no such configuration: {error}")


@pytest.mark.parametrize(("model_type", "changes", "words"), SAID.values(), ids=SAID)
def test_said_by_the_configuration(model_type, changes, words):
    config = config_of(model_type, changes)
    message = sentence(config)
    assert words in message
    assert message.startswith(class_name(config))
    # A checkpoint with eyes is loaded as its text decoder, which is then what is named.
    named = {message, message.replace("ForConditionalGeneration", "ForCausalLM")}
    assert sentence(config, refuse_unloadable) in named
    assert sentence(config, lambda config: layout_of(config, torch.float32)) in named


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [("llama", {}), ("gemma3_text", {}), ("gemma4_text", {"use_bidirectional_attention": "vision"})],
)
def test_nothing_to_say(model_type, changes):
    """Bidirectional within images alone does not concern a text."""
    refuse(config_of(model_type, changes))
    refuse_unloadable(config_of(model_type, changes))


def test_text_decoders_that_are_not_loaded_by_themselves():
    """Of these transformers makes no model that reads a text."""
    config = transformers.CLIPConfig(architectures=["CLIPModel"])
    assert sentence(config, refuse_unloadable) == (
        "CLIPModel is a multimodal model (text with vision), whose text decoder transformers does not load by itself"
    )


def test_no_language_model_at_all():
    assert sentence(transformers.ViTConfig(), refuse_unloadable) == (
        "vit is not a decoder-only language model that transformers knows"
    )


OTHERS = sorted(set(CONFIG_MAPPING_NAMES) - set(model_types()))


@pytest.mark.parametrize("part", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 10))])
def test_every_other_configuration_of_transformers(part):
    """Vision, speech, encoders, several models in one: a sentence each."""
    said = 0
    for model_type in OTHERS[part::10]:
        try:
            config = CONFIG_MAPPING[model_type]()
        except Exception:  # some have none that is made of defaults alone
            continue
        if config.model_type != model_type:  # known by another name as well
            continue
        assert "NoneType" not in sentence(config, refuse_unloadable)
        said += 1
    assert said > 0.9 * len(OTHERS[part::10])


def test_values_that_differ_from_layer_to_layer():
    """Newer configurations raise where one asks for such a value of the whole model."""

    class Config(transformers.LlamaConfig):
        @property
        def sliding_window(self):
            raise RuntimeError("'sliding_window' is a per-layer attribute and may vary across layers")

    config = transformers.LlamaConfig(num_hidden_layers=1)
    config.__class__ = Config
    assert "gives its layers a sliding_window of their own each" in sentence(config)


def test_a_supported_kind_of_layer_is_taken_off_in_one_place(monkeypatch):
    """What is then the matter, if anything, is what a step through the model shows."""
    config = config_of("minimax", {})
    assert "'linear_attention'" in sentence(config)
    monkeypatch.setattr(refusals, "SUPPORTED_LAYERS", (*refusals.SUPPORTED_LAYERS, "linear_attention"))
    refuse(config)
    refuse_unloadable(config)
    with pytest.raises(UnsupportedModelError, match="keep a state other than keys and values"):
        layout_of(config, torch.float32)
