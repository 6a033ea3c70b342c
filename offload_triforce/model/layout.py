"""What a model's attention looks like from outside: found out by running one token through it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from offload_triforce.errors import UnsupportedModelError
from offload_triforce.kernels.ops import AttentionParams
from offload_triforce.model.adapter import attached, limiting_window, run


@dataclass(frozen=True)
class LayerShape:
    """One layer's attention: KV heads, head dimension, and the sliding window if it has one."""

    kv_heads: int
    head_dim: int
    window: int | None


@dataclass(frozen=True)
class ModelLayout:
    """The attention of a whole model. ``full`` and ``sliding`` list the layers without and with a window."""

    layers: tuple[LayerShape, ...]
    dtype: torch.dtype
    device: torch.device
    vocabulary: int  # number of logits
    max_positions: int | None
    longrope_switch: int | None  # text length above which longrope uses its long frequencies

    @property
    def full(self) -> list[int]:
        """Layers that attend to the whole context."""
        return [i for i, layer in enumerate(self.layers) if layer.window is None]

    @property
    def sliding(self) -> list[int]:
        """Layers with a sliding window."""
        return [i for i, layer in enumerate(self.layers) if layer.window is not None]

    def token_bytes(self, layer: int) -> int:
        """Bytes of one token's K and V in one layer."""
        shape = self.layers[layer]
        return 2 * shape.kv_heads * shape.head_dim * self.dtype.itemsize


class _Probe:
    """A view that writes down what it is asked and answers zeros."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[LayerShape, torch.dtype, torch.device]] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
        if key.shape != value.shape or query.shape[-1] != key.shape[-1]:
            raise UnsupportedModelError("attention with values of another size than its keys (MLA) is not supported")
        if layer in self.seen:
            raise UnsupportedModelError(f"layer {layer} attends more than once per step, which is not supported")
        self.seen[layer] = LayerShape(key.shape[0], key.shape[2], params.window), key.dtype, key.device
        return torch.zeros_like(query)


def probe(model: PreTrainedModel) -> ModelLayout:
    """Find the layout out, and refuse by name what this runtime cannot decode exactly.

    Raises:
        UnsupportedModelError: says which feature is the reason.
    """
    name = type(model).__name__
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder; only decoder-only models are supported")
    _refuse_dynamic_rope(name, config)
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is None or len(layers) != config.num_hidden_layers:
        raise UnsupportedModelError(f"{name} does not keep its decoder layers in a list that the prefill can drive")
    view = _Probe()
    try:
        with attached(model), torch.no_grad():
            vocabulary = run(model, [0], [0], view, keep=1).shape[-1]
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{name}: {error}") from error
    except (TypeError, ValueError, AttributeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnsupportedModelError(
            f"{name} does not run through the transformers attention registry ({reason})"
        ) from error
    missing = sorted(set(range(config.num_hidden_layers)) - set(view.seen))
    if missing:
        raise UnsupportedModelError(
            f"{len(missing)} of {config.num_hidden_layers} layers of {name} keep a state other than keys and values "
            f"(the first is layer {missing[0]}); only attention layers are supported"
        )
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModelError(f"{name} counts positions by itself and cannot be told where a token stands")
    _refuse_hidden_windows(name, config, view.seen)
    shapes, dtypes, devices = zip(*(view.seen[i] for i in sorted(view.seen)), strict=True)
    positions = getattr(config, "max_position_embeddings", None)
    layout = ModelLayout(shapes, dtypes[0], devices[0], vocabulary, positions, _longrope_switch(config))
    for kind, group in (("full-attention", layout.full), ("sliding-window", layout.sliding)):
        if len({(shapes[i].kv_heads, shapes[i].head_dim) for i in group}) > 1:
            raise UnsupportedModelError(f"the {kind} layers of {name} differ in their KV heads or head dimension")
    if len(set(devices)) > 1:
        raise UnsupportedModelError(f"{name} is spread over {len(set(devices))} devices; load it onto one")
    return layout


def _refuse_hidden_windows(name: str, config: Any, seen: dict[int, tuple[LayerShape, Any, Any]]) -> None:
    """Some models put their window (or chunking) into the mask alone, which is not built here."""
    count = config.num_hidden_layers
    types = getattr(config, "layer_types", None)
    if types is None:
        slides = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
        types = ["sliding_attention" if slides else "full_attention"] * count
    for layer, kind in enumerate(types):
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedModelError(f"{name} has layers of type {kind!r}; only full and sliding ones are known")
        expected = limiting_window(config.sliding_window, config) if kind == "sliding_attention" else None
        if seen[layer][0].window != expected:
            raise UnsupportedModelError(
                f"{name} does not tell its attention function about the sliding window of layer {layer}; such models "
                "are not supported"
            )


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    """All rotary settings of a config: one, or one per layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in parameters:
        return [parameters]
    return [value for value in parameters.values() if isinstance(value, dict)]


def _refuse_dynamic_rope(name: str, config: Any) -> None:
    if any(p.get("rope_type") == "dynamic" for p in _rope_parameters(config)):
        raise UnsupportedModelError(
            f"{name} uses dynamic NTK rotary scaling: its frequencies change as the text grows, so cached keys go "
            "stale; set rope_type to 'yarn' or 'linear' with a fixed factor"
        )


def _longrope_switch(config: Any) -> int | None:
    for parameters in _rope_parameters(config):
        if parameters.get("rope_type") == "longrope":
            fallback = getattr(config, "original_max_position_embeddings", None)
            return parameters.get("original_max_position_embeddings") or fallback
    return None
