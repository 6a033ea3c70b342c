"""A model as its configuration alone describes it: the attention's layout, and the bytes of its weights.

The counts are exact, since transformers itself builds the model, on a device without memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from offload_triforce.errors import InputError, UnsupportedModelError
from offload_triforce.model.adapter import limiting_window
from offload_triforce.model.layout import LayerShape, ModelLayout
from offload_triforce.model.loader import QUANTIZATIONS

# bitsandbytes without double quantisation, as the loader asks for: one float32 scale per block of 64 weights.
NF4_BLOCK = 64


@dataclass(frozen=True)
class Weights:
    """Bytes of weights on the device, and what a step through one decoder layer (a mean one) reads and computes.

    Attributes:
        parameters: of the whole model. total: bytes of all.
        layer: bytes of a layer that every token needs. layer_parameters: the same, counted.
        unpacked: bytes that nf4 weights of a layer are written out to and read from again, at more than one token.
        experts: bytes of all experts of a layer. expert_parameters: the same, counted.
        expert_share: share of the experts that one token chooses.
        head: bytes of the output embedding. head_parameters: the same, counted.
    """

    parameters: int
    total: int
    layer: float
    layer_parameters: float
    unpacked: float
    experts: float
    expert_parameters: float
    expert_share: float
    head: int
    head_parameters: int


@dataclass(frozen=True)
class ModelShape:
    """What planning needs to know of a model. ``heads``: query heads; ``quantize``: nf4, int8 or None."""

    name: str
    config: PretrainedConfig
    layout: ModelLayout
    heads: int
    weights: Weights
    quantize: str | None = None


def shape_of(
    config: PretrainedConfig, dtype: torch.dtype = torch.bfloat16, quantize: str | None = None, name: str = ""
) -> ModelShape:
    """The shape of the model that a configuration describes, as ``load_model`` would load it.

    Raises:
        UnsupportedModelError: a model that this runtime does not decode.
        InputError: an unknown quantisation, or a configuration that does not make a model.
    """
    if quantize is not None and quantize not in QUANTIZATIONS:
        raise InputError(f"unknown quantisation {quantize!r}; use {' or '.join(QUANTIZATIONS)}")
    layout = layout_of(config, dtype, name)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, TypeError, AttributeError, KeyError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"the configuration of {name or 'the model'} makes no language model: {reason}") from error
    weights = weigh(model, quantize)
    return ModelShape(name, config, layout, config.get_text_config().num_attention_heads, weights, quantize)


def shape_of_loaded(model: PreTrainedModel, layout: ModelLayout) -> ModelShape:
    """The same of a model that is there, with its layout."""
    return ModelShape("", model.config, layout, model.config.get_text_config().num_attention_heads, weigh(model, None))


def layout_of(config: PretrainedConfig, dtype: torch.dtype, name: str = "") -> ModelLayout:
    """What ``probe`` finds in the loaded model, read from the configuration (the longrope switch apart).

    Raises:
        UnsupportedModelError: says which feature is the reason.
    """
    name, text = name or config.model_type, config.get_text_config()
    if config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder; only decoder-only models are supported")
    if getattr(text, "kv_lora_rank", None):
        raise UnsupportedModelError(f"{name} has values of another size than its keys (MLA), which is not supported")
    if not getattr(text, "num_attention_heads", None) or not getattr(text, "num_hidden_layers", None):
        raise UnsupportedModelError(f"{name} does not say how many attention heads and layers it has")
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    windows = layer_windows(name, text)
    layers = tuple(LayerShape(kv_heads, dim, window) for window in windows)
    positions = getattr(text, "max_position_embeddings", None)
    return ModelLayout(layers, dtype, torch.device("meta"), text.vocab_size, positions, None)


def layer_windows(name: str, text: PretrainedConfig) -> list[int | None]:
    """The sliding window of each layer; None where there is none.

    Raises:
        UnsupportedModelError: a layer of another type.
    """
    slides = getattr(text, "use_sliding_window", True) and getattr(text, "sliding_window", None)
    types = getattr(text, "layer_types", None)
    if types is None:
        types = ["sliding_attention" if slides else "full_attention"] * text.num_hidden_layers
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedModelError(f"{name} has layers of type {kind!r}; only full and sliding ones are known")
    window = limiting_window(getattr(text, "sliding_window", None), text)
    return [window if kind == "sliding_attention" else None for kind in types]


def weigh(model: PreTrainedModel, quantize: str | None) -> Weights:
    """Count a model's weights. ``model`` may lie on the meta device; it is not quantised yet."""
    packed = _packed_names(model) if quantize else set()
    layers, text = model.get_decoder().layers, model.config.get_text_config()
    inside = {id(weight) for weight in layers.parameters()}
    total = parameters = 0
    layer, experts, unpacked = [0.0, 0.0], [0.0, 0.0], 0.0
    for name, weight in model.named_parameters():
        size = _packed_bytes(weight, quantize) if name in packed else weight.numel() * weight.element_size()
        total, parameters = total + size, parameters + weight.numel()
        if id(weight) not in inside:
            continue
        kind = experts if ".experts." in name else layer
        kind[0], kind[1] = kind[0] + size, kind[1] + weight.numel()
        if name in packed and quantize == "nf4":
            unpacked += 2 * weight.numel() * weight.element_size()
    head, count = model.get_output_embeddings().weight, len(layers)
    available = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)
    chosen = getattr(text, "num_experts_per_tok", None)
    return Weights(
        parameters=parameters,
        total=total,
        layer=layer[0] / count,
        layer_parameters=layer[1] / count,
        unpacked=unpacked / count,
        experts=experts[0] / count,
        expert_parameters=experts[1] / count,
        expert_share=chosen / available if available and chosen else 1.0,
        head=head.numel() * head.element_size(),
        head_parameters=head.numel(),
    )


def _packed_names(model: PreTrainedModel) -> set[str]:
    """The weights that bitsandbytes replaces: those of plain linear layers, the output embedding apart."""
    head = model.get_output_embeddings()
    return {f"{name}.weight" for name, part in model.named_modules() if type(part) is nn.Linear and part is not head}


def _packed_bytes(weight: Any, quantize: str) -> int:
    if quantize == "int8":
        return weight.numel() + 4 * weight.shape[0]  # one float32 scale per row
    return math.ceil(weight.numel() / 2) + 4 * math.ceil(weight.numel() / NF4_BLOCK)
