"""A tiny random model of every causal language model that the installed transformers knows, by its model type.

Nothing is listed but what has to differ: a default configuration is made, and whatever it holds of the usual sizes is
cut down. Layers of all kinds that the family has stay in it (sliding and full, dense and sparse, recurrent).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from benchmarks.tiny_sizes import ADJUSTMENTS, EVEN_IF_NONE, NEEDED, SIZES

VOCABULARY = SIZES["vocab_size"]
LAYERS = SIZES["num_hidden_layers"]
# Of these no small configuration has been found that transformers takes.
UNMADE = frozenset(["apertus1p5", "florence2", "glm5_next", "hy_v4_vl", "nemo_speechlm"])
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
_INNER = ("text_config", "decoder")  # where a model of several parts keeps its text decoder's settings


def model_types() -> list[str]:
    """All model types that transformers makes a language model of, in alphabetical order: with eyes and ears, too."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES})


def whole_model(config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """The model of a configuration as transformers has it: with all that it sees and hears with, where it does."""
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        return MODEL_FOR_MULTIMODAL_LM_MAPPING[type(config)]._from_config(config, **options).eval()
    return AutoModelForCausalLM.from_config(config, **options).eval()


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """A small configuration of that type, with a sliding window if the family's own has one.

    ``changes``: other values, by name; they go to the text decoder's settings where these are a part of their own.
    """
    kind = CONFIG_MAPPING[model_type]
    settings = _merge(_small(kind(**NEEDED.get(model_type, {}))), ADJUSTMENTS.get(model_type, {}))
    settings.pop("model_type", None)
    inner = next((name for name in _INNER if isinstance(settings.get(name), dict)), None)
    return kind(**_merge(settings, changes if inner is None else {inner: changes}))


def tiny_model(config: PreTrainedConfig, spread: float = 0.15, seed: int = 0) -> PreTrainedModel:
    """A random model in float32 on the CPU.

    Weights are drawn here with that ``spread``, not by the model: its own scale leaves most families saying one word
    for ever. What is no matrix gets some noise, so that norms, biases, sinks and decays have a part in what it says.
    """
    torch.manual_seed(seed)
    # Eager attention: the other ones of transformers leave out what they do not know, such as soft-capping.
    model = whole_model(config, dtype=torch.float32, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() > 1 and min(weight.shape) > 1:
                weight.copy_(spread * noise)
            else:
                weight.add_(0.1 * noise)
    return model


def _small(default: PreTrainedConfig) -> dict[str, Any]:
    """The settings of a small one: those of ``SIZES`` that the default has, and shorter lists of layers."""
    layers = next((n for name in _COUNTS if isinstance(n := vars(default).get(name), int)), 0)
    small: dict[str, Any] = {}
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            small[name] = _small(value)
        elif name in SIZES and (value is not None or name in EVEN_IF_NONE):
            small[name] = SIZES[name]
        elif isinstance(value, (list, tuple)) and len(value) == layers > LAYERS:
            kinds = list(dict.fromkeys(value)) if isinstance(value[0], str) else list(value)
            small[name] = (kinds * LAYERS)[:LAYERS]
    if default.model_type:
        small["model_type"] = default.model_type
    if vars(default).get("kv_lora_rank"):
        small["num_key_value_heads"] = SIZES["num_attention_heads"]  # latent attention has a key for each query head
    return small


def _merge(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Settings with changes, dictionary within dictionary."""
    merged = dict(settings)
    for name, value in changes.items():
        nested = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merge(merged[name], value) if nested else value
    return merged
