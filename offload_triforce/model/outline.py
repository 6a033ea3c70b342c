"""What planning needs to know of a model, as plain values: its attention, layer by layer, and the bytes of its weights.

``layout`` finds it in a loaded model and ``shape`` in a configuration, both with transformers; of the models in
``names`` it is written down. To list those, torch need not be there, so it is imported late.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from offload_triforce.cache.sizes import RecurrentShape
from offload_triforce.model.counts import (
    Counts,
    Weights,
    check_head_quantization,
    check_packed_once,
    check_quantization,
    packing_options,
)
from offload_triforce.model.known import KnownModel, PlainConfig
from offload_triforce.model.windows import limiting_window

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class LayerShape:
    """One layer's attention: KV heads, head dimension, and the sliding window if it has one."""

    kv_heads: int
    head_dim: int
    window: int | None

    def token_bytes(self, itemsize: int) -> int:
        """Bytes of one token's K and V."""
        return 2 * self.kv_heads * self.head_dim * itemsize


@dataclass(frozen=True)
class ModelLayout:
    """The layers of a whole model, by what they remember: ``full`` and ``sliding`` list those that attend, without and
    with a window, and ``recurrent`` those that keep a state.
    """

    layers: tuple[LayerShape | RecurrentShape, ...]
    dtype: torch.dtype
    device: torch.device
    vocabulary: int  # number of logits
    max_positions: int | None
    longrope_switch: int | None  # text length above which longrope uses its long frequencies

    @property
    def full(self) -> list[int]:
        """Layers that attend to the whole context."""
        return [i for i, layer in enumerate(self.layers) if isinstance(layer, LayerShape) and layer.window is None]

    @property
    def sliding(self) -> list[int]:
        """Layers with a sliding window."""
        return [i for i, layer in enumerate(self.layers) if isinstance(layer, LayerShape) and layer.window is not None]

    @property
    def recurrent(self) -> list[int]:
        """Layers with a recurrent state."""
        return [i for i, layer in enumerate(self.layers) if isinstance(layer, RecurrentShape)]

    @property
    def attention(self) -> list[LayerShape]:
        """The shapes of all layers that attend."""
        return [layer for layer in self.layers if isinstance(layer, LayerShape)]

    def reach(self, layer: int, tokens: int) -> int:
        """Tokens that one layer attends to in a text of that many; none where it keeps a state instead."""
        shape = self.layers[layer]
        if isinstance(shape, RecurrentShape):
            return 0
        return tokens if shape.window is None else min(shape.window, tokens)

    def held_bytes(self, layer: int, tokens: int) -> int:
        """Bytes of what one layer keeps of a text of that many tokens: keys and values, or its state."""
        shape = self.layers[layer]
        if isinstance(shape, RecurrentShape):
            return shape.state_bytes(self.dtype.itemsize)
        return self.reach(layer, tokens) * self.token_bytes(layer)

    def token_bytes(self, layer: int) -> int:
        """Bytes of one token's K and V in one layer; 0 where a state takes all tokens in."""
        shape = self.layers[layer]
        if isinstance(shape, RecurrentShape):
            return 0
        return shape.token_bytes(self.dtype.itemsize)


@dataclass(frozen=True)
class ModelShape:
    """A whole model.

    Attributes:
        name: for people. config: transformers' own, or a plain one.
        heads: query heads. weights: in bytes; counts: the same, whatever the dtype and quantisation.
        embedding: bytes of the input embeddings, if they can lie in host memory; else 0.
        quantize: nf4, int8 or None. quantize_head: int8 or None, of the output embedding.
        gguf: the file that is loaded, where it is one: it is unpacked then.
        mtp: what is in its MTP head, if its files hold one.
        reads_hidden: width of the hidden states of another model that it reads, being the head of that; else 0.
        packed: how its weights are packed in the files (``prequantized``), if they are. packed_counts: what the files
            hold, if they are there.
    """

    name: str
    config: PretrainedConfig | PlainConfig
    layout: ModelLayout
    heads: int
    weights: Weights
    counts: Counts
    embedding: int = 0
    quantize: str | None = None
    quantize_head: str | None = None
    gguf: Path | None = None
    mtp: Counts | None = None
    reads_hidden: int = 0
    packed: str | None = None
    packed_counts: Counts | None = None

    def quantized(self, quantize: str | None, quantize_head: str | None = None) -> ModelShape:
        """The same model with its weights packed otherwise.

        Raises:
            InputError: an unknown quantisation, or one of an output head that is the input embedding too, or of weights
                that are packed in the files.
        """
        check_quantization(quantize)
        if self.packed is not None:
            check_packed_once(self.name, self.packed, quantize, quantize_head)
        check_head_quantization(quantize_head, self.counts.tied)
        weights = self.counts.weights(self.layout.dtype.itemsize, quantize, quantize_head)
        return replace(self, weights=weights, quantize=quantize, quantize_head=quantize_head)

    @property
    def mtp_head(self) -> ModelShape | None:
        """The MTP head as a draft model: one layer that attends to everything, in the model's dtype. The output
        embedding is the model's: it is read, and takes no memory. None if there is no head that is read from files.
        """
        if self.mtp is None or self.gguf is not None:
            return None
        layout = self.layout
        one = layout.layers[layout.full[-1]] if layout.full else layout.attention[-1]
        own = self.mtp.weights(layout.dtype.itemsize, None)
        weights = replace(own, head=self.weights.head, head_parameters=self.weights.head_parameters)
        width = self.config.get_text_config().hidden_size
        return ModelShape(
            f"the MTP head of {self.name}",
            self.config,
            replace(layout, layers=(one,)),
            self.heads,
            weights,
            self.mtp,
            reads_hidden=width,
        )

    def packed_as_in_files(self) -> ModelShape:
        """The same model with its weights as its files hold them, where those are there."""
        if self.packed_counts is None:
            return self
        weights = self.packed_counts.weights(self.layout.dtype.itemsize, None)
        return replace(self, counts=self.packed_counts, weights=weights)

    @property
    def is_packed(self) -> bool:
        """Whether its weights are counted as its files hold them packed."""
        return self.packed_counts is not None and self.counts is self.packed_counts

    @property
    def packing(self) -> str:
        """The options of ``generate`` that pack the weights so."""
        return packing_options(self.quantize, self.quantize_head)


def layers_of_known(known: KnownModel) -> tuple[LayerShape | RecurrentShape, ...]:
    """The layers of a model of the table, from what is written there: without torch."""
    text = PlainConfig(known.config).get_text_config()
    window = limiting_window(getattr(text, "sliding_window", None), text)
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        slides = window is not None and getattr(text, "use_sliding_window", True)
        kinds = ["sliding_attention" if slides else "full_attention"] * text.num_hidden_layers
    return tuple(_layer(kind, text, window) for kind in kinds)


def shape_of_known(known: KnownModel, dtype: torch.dtype | None = None) -> ModelShape:
    """A model of the table, from what is written there (the longrope switch apart). In bfloat16, if not said."""
    import torch

    dtype = dtype or torch.bfloat16
    config = PlainConfig(known.config)
    text, positions = config.get_text_config(), config.get_text_config().max_position_embeddings
    layout = ModelLayout(layers_of_known(known), dtype, torch.device("meta"), text.vocab_size, positions, None)
    weights = known.counts.weights(dtype.itemsize, None)
    embedding = 0 if text.tie_word_embeddings else weights.head
    heads = text.num_attention_heads
    shape = ModelShape(known.title, config, layout, heads, weights, known.counts, embedding, mtp=known.mtp)
    # What the files hold is written down for the dtype that they were published in.
    packed = known.packed_counts if dtype.itemsize == torch.bfloat16.itemsize else None
    return replace(shape, packed=known.packed, packed_counts=packed)


def _layer(kind: str, text: PlainConfig, window: int | None) -> LayerShape | RecurrentShape:
    if kind == "linear_attention":
        keys, key_dim = text.linear_num_key_heads, text.linear_key_head_dim
        values, value_dim = text.linear_num_value_heads, text.linear_value_head_dim
        channels = 2 * keys * key_dim + values * value_dim  # queries, keys and values are convolved together
        return RecurrentShape(keys, values, key_dim, value_dim, channels, text.linear_conv_kernel_dim)
    heads = text.num_key_value_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if kind == "sliding_attention":
        return LayerShape(heads, dim, window)
    dim = getattr(text, "global_head_dim", None) or dim  # Gemma 4's full layers have larger heads, and fewer of them
    if getattr(text, "attention_k_eq_v", False):
        heads = getattr(text, "num_global_key_value_heads", None) or heads
    return LayerShape(heads, dim, None)
