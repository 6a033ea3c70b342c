"""A model as its configuration alone describes it: the attention's layout, and the bytes of its weights.

The counts are exact, since transformers itself builds the model, on a device without memory.
"""

from __future__ import annotations

import torch
from transformers import PretrainedConfig, PreTrainedModel

from offload_triforce.model.blank import blank_model, probe_blank
from offload_triforce.model.counts import check_quantization
from offload_triforce.model.embeddings import own_embedding
from offload_triforce.model.mtp_files import blank_head
from offload_triforce.model.outline import ModelLayout, ModelShape
from offload_triforce.model.weights import count, count_head, packing_of


def shape_of(
    config: PretrainedConfig, dtype: torch.dtype = torch.bfloat16, quantize: str | None = None, name: str = ""
) -> ModelShape:
    """The shape of the model that a configuration describes, as ``load_model`` would load it.

    Raises:
        UnsupportedModelError: a model that this runtime does not decode.
        InputError: an unknown quantisation, or a configuration that does not make a model.
    """
    check_quantization(quantize)
    model = blank_model(config, dtype)
    layout = probe_blank(model)
    heads, counts = config.get_text_config().num_attention_heads, count(model)
    weights, own = counts.weights(dtype.itemsize, quantize), own_embedding(model)
    embedding = own.weight.nbytes if own is not None else 0
    head = blank_head(model)
    mtp = None if head is None else count_head(head, model)
    return ModelShape(name, config, layout, heads, weights, counts, embedding, quantize, mtp=mtp)


def shape_of_loaded(model: PreTrainedModel, layout: ModelLayout) -> ModelShape:
    """The same of a model that is there, with its layout: its weights may be packed, its input embeddings stay put."""
    heads, counts = model.config.get_text_config().num_attention_heads, count(model)
    shape = ModelShape("", model.config, layout, heads, counts.weights(model.dtype.itemsize, None), counts)
    return shape.quantized(*packing_of(model))
