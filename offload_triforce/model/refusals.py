"""What a configuration says that this runtime cannot decode exactly: one list, for loading, planning and probing.

A feature that becomes supported is taken off here. What only a run shows is in ``layout``: values of another size
than keys, masks and windows that the attention is not told about.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from offload_triforce.errors import UnsupportedModelError
from offload_triforce.model.recurrent import FAMILIES as RECURRENT_FAMILIES

SUPPORTED_LAYERS = ("full_attention", "sliding_attention")

# What the other kinds are, by the name that ``layer_types`` has for them.
_LAYERS = {
    "linear_attention": "a recurrent state: linear attention or a state space",
    "conv": "short convolutions",
    "hybrid": "attention and a recurrent state in one",
    "hybrid_sliding": "sliding attention and a recurrent state in one",
    "chunked_attention": "attention within chunks of the text",
    "indexed_attention": "sparse attention through an indexer",
    "deepseek_sparse_attention": "sparse attention through an indexer",  # its name in transformers up to 5.18
    "qwen_sparse_attention": "sparse attention through an indexer",
    "minimax_m3_sparse": "sparse attention through an indexer",
    "compressed_sparse_attention": "sparse attention over compressed keys",
    "heavily_compressed_attention": "attention over compressed keys",
    "moe": "experts without attention",
    "mlp": "a feed-forward network without attention",
}

# Families whose reason no field of the configuration gives.
_FAMILIES = {
    "gemma3n": "keeps several hidden states per token (AltUp)",
    "gemma3n_text": "keeps several hidden states per token (AltUp)",
    "gemma4_assistant": "is a draft head that reads the keys and values of another model",
    "gemma4_unified_assistant": "is a draft head that reads the keys and values of another model",
    "shieldgemma2": "says whether an image is harmful, and no text",
    "doge": "masks its attention by what the values say (dynamic mask attention)",
}


def refuse(config: PreTrainedConfig, name: str = "") -> None:
    """Raise if a model of this configuration would not be decoded exactly.

    Args:
        config: of the whole model, or of its text decoder. name: of its class, for the sentence.

    Raises:
        UnsupportedModelError: says which feature is the reason.
    """
    name = name or class_name(config)
    # Of some classes the decoder can be had alone, and then its own configuration no longer says so.
    if config.is_encoder_decoder or getattr(type(config), "is_encoder_decoder", False) is True:
        raise UnsupportedModelError(f"{name} is an encoder-decoder; only decoder-only models are supported")
    text = _text_of(config, name)
    for reason in _REASONS:
        sentence = reason(config, text)
        if sentence is not None:
            raise UnsupportedModelError(f"{name} {sentence}")


def refuse_unloadable(config: PreTrainedConfig) -> None:
    """The same for a model that is to be made from the configuration: there has to be a causal language model of it.

    Raises:
        UnsupportedModelError: likewise.
    """
    name, names = class_name(config), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if config.is_encoder_decoder:
        refuse(config, name)
    text = _text_of(config, name)
    known = config.model_type in names or config.model_type not in CONFIG_MAPPING_NAMES or hasattr(config, "auto_map")
    known = known or config.model_type in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES  # made without other parts: text_part
    if not known and text is config:
        raise UnsupportedModelError(f"{name} is not a decoder-only language model that transformers knows")
    # Of some models with eyes, AutoModelForCausalLM makes the text decoder alone.
    refuse(text if names.get(config.model_type) == names.get(text.model_type, "") else config, name)
    if not known:
        parts = " and ".join(part.removesuffix("_config") for part in config.sub_configs if part != "text_config")
        raise UnsupportedModelError(
            f"{name} is a multimodal model (text with {parts}), whose text decoder transformers does not load by itself"
        )


def _text_of(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    try:
        return config.get_text_config()
    except ValueError as error:
        raise UnsupportedModelError(f"{name} holds several text models; only one is supported") from error


def class_name(config: PreTrainedConfig) -> str:
    """The class that transformers' auto classes make of a configuration; where they make none, what the file says."""
    kind = config.model_type
    made = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) or MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.get(kind)
    if made is None:
        return (config.architectures or [config.model_type or type(config).__name__])[0]
    return made if isinstance(made, str) else made[0]


def rope_parameters(text: PreTrainedConfig) -> list[dict[str, Any]]:
    """All rotary settings of a text decoder: one, or one per layer type."""
    parameters = getattr(text, "rope_parameters", None) or {}
    if "rope_type" in parameters:
        return [parameters]
    return [value for value in parameters.values() if isinstance(value, dict)]


def _family(config: PreTrainedConfig, text: PreTrainedConfig) -> str | None:
    feature = _FAMILIES.get(config.model_type) or _FAMILIES.get(text.model_type)
    return None if feature is None else f"{feature}, which is not supported"


def _bidirectional(config: PreTrainedConfig, text: PreTrainedConfig) -> str | None:
    """``vision`` is bidirectional within images alone; there are none in a text."""
    for part in (text, config):
        if getattr(part, "use_bidirectional_attention", None) in (True, "all"):
            setting = f"use_bidirectional_attention is {part.use_bidirectional_attention!r}"
        elif getattr(part, "is_causal", None) is False:
            setting = "is_causal is False"
        else:
            continue
        return f"attends in both directions ({setting}); only causal attention can be decoded over a cache"
    return None


def _layers(config: PreTrainedConfig, text: PreTrainedConfig) -> str | None:
    kinds = list(getattr(text, "layer_types", None) or ())
    recurrent = ("linear_attention",) if text.model_type in RECURRENT_FAMILIES else ()
    for kind in kinds:
        if kind not in (*SUPPORTED_LAYERS, *recurrent):
            meaning = f" ({_LAYERS[kind]})" if kind in _LAYERS else ""
            return (
                f"has {kinds.count(kind)} of {len(kinds)} layers of type {kind!r}{meaning}; only full and sliding "
                "attention is supported"
            )
    return None


def _layer_by_layer(config: PreTrainedConfig, text: PreTrainedConfig) -> str | None:
    """Newer configurations raise where a value differs between layers and is asked of the whole model."""
    for value in ("sliding_window", "num_attention_heads", "intermediate_size", "max_position_embeddings"):
        try:
            getattr(text, value, None)
        except RuntimeError:
            return f"gives its layers a {value} of their own each, which is not supported"
    return None


def _dynamic_rope(config: PreTrainedConfig, text: PreTrainedConfig) -> str | None:
    if any(parameters.get("rope_type") == "dynamic" for parameters in rope_parameters(text)):
        return (
            "uses dynamic NTK rotary scaling: its frequencies change as the text grows, so cached keys go stale; set "
            "rope_type to 'yarn' or 'linear' with a fixed factor"
        )
    return None


# In this order: the first that applies is said.
_REASONS: tuple[Callable[[PreTrainedConfig, PreTrainedConfig], str | None], ...] = (
    _family,
    _bidirectional,
    _layers,
    _layer_by_layer,
    _dynamic_rope,
)
