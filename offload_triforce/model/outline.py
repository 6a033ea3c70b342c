"""What planning needs to know of a model, as plain values: its attention, layer by layer, and the bytes of its weights.

``layout`` finds it in a loaded model and ``shape`` in a configuration, both with transformers; of the models in
``names`` it is written down.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from offload_triforce.model.counts import Counts, Weights, check_quantization
from offload_triforce.model.names import KnownModel, PlainConfig
from offload_triforce.model.windows import limiting_window

if TYPE_CHECKING:
    from transformers import PretrainedConfig


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


@dataclass(frozen=True)
class ModelShape:
    """A whole model.

    Attributes:
        name: for people. config: transformers' own, or a plain one.
        heads: query heads. weights: in bytes; counts: the same, whatever the dtype and quantisation.
        quantize: nf4, int8 or None.
        gguf: the file that is loaded, where it is one: it is unpacked then.
    """

    name: str
    config: PretrainedConfig | PlainConfig
    layout: ModelLayout
    heads: int
    weights: Weights
    counts: Counts
    quantize: str | None = None
    gguf: Path | None = None

    def quantized(self, quantize: str | None) -> ModelShape:
        """The same model with its weights packed otherwise.

        Raises:
            InputError: an unknown quantisation.
        """
        check_quantization(quantize)
        weights = self.counts.weights(self.layout.dtype.itemsize, quantize)
        return replace(self, weights=weights, quantize=quantize)


def shape_of_known(known: KnownModel, dtype: torch.dtype = torch.bfloat16) -> ModelShape:
    """A model of the table, from what is written there (the longrope switch apart)."""
    config = PlainConfig(known.config)
    text = config.get_text_config()
    window = limiting_window(text.sliding_window, text)
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        slides = window is not None and getattr(text, "use_sliding_window", True)
        kinds = ["sliding_attention" if slides else "full_attention"] * text.num_hidden_layers
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    layers = tuple(
        LayerShape(text.num_key_value_heads, dim, window if kind == "sliding_attention" else None) for kind in kinds
    )
    positions = text.max_position_embeddings
    layout = ModelLayout(layers, dtype, torch.device("meta"), text.vocab_size, positions, None)
    weights = known.counts.weights(dtype.itemsize, None)
    return ModelShape(known.title, config, layout, text.num_attention_heads, weights, known.counts)
