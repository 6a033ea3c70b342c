"""Counting a model's weights, and which of them a quantisation packs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from offload_triforce.machine.units import gigabytes
from offload_triforce.model.counts import NF4_BLOCK, NOTHING, Counts, Matrix, Part
from offload_triforce.model.layers import layers_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# Packed linear layers (bitsandbytes') and output embeddings (``packed_head``) by the quantisation that makes them:
# known by name, so that planning need not import them.
_PACKED = {"Linear4bit": "nf4", "Linear8bitLt": "int8"}
_PACKED_HEADS = {"Int8Head": "int8"}


def count(model: PreTrainedModel) -> Counts:
    """Count a model's weights, whether they are packed or not. It may lie on the meta device."""
    packed = {f"{name}.weight": (part.out_features, part.in_features) for name, part in _linear(model)}
    layers, text, head = layers_of(model.get_decoder()), model.config.get_text_config(), model.get_output_embeddings()
    decoder = {id(part) for part in (*layers.parameters(), *layers.modules())}
    inside = experts = outside = NOTHING
    shapes: Counter[tuple[int, int]] = Counter()
    largest = 0
    for name, held, part in _parts(model, packed):
        largest = max(largest, part.packed)
        if id(held) not in decoder:
            outside = outside.plus(part)
        elif ".experts." in name:
            experts = experts.plus(part)
        else:
            inside = inside.plus(part)
            shapes.update([packed[name]] if name in packed else [])
    available = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)
    chosen = getattr(text, "num_experts_per_tok", None)
    share = chosen / available if available and chosen else 1.0
    matrices = tuple(Matrix(*shape, number) for shape, number in sorted(shapes.items()))
    rows, columns = head.out_features, head.in_features
    tied = getattr(head, "weight", None) is model.get_input_embeddings().weight
    return Counts(len(layers), inside, outside, rows * columns, largest, experts, share, matrices, rows, tied)


def _parts(
    model: PreTrainedModel, packed: dict[str, tuple[int, int]]
) -> Iterator[tuple[str, nn.Parameter | nn.Module, Part]]:
    """All weights, by name, with what holds them. ``packed``: rows and columns of those that we pack."""
    head, itemsize = model.get_output_embeddings(), model.dtype.itemsize
    of_head, scale = getattr(head, "weight", None), getattr(head, "scale", None)
    for name, weight in model.named_parameters():
        number = weight.numel()
        extra = number * (weight.element_size() - itemsize)
        if name in packed:
            rows, columns = packed[name]
            number, extra = rows * columns, extra if weight.is_floating_point() else 0
            yield name, weight, Part(0, number, rows, -(-number // NF4_BLOCK), extra)
        elif weight is of_head or weight is not scale:
            yield name, weight, Part(number, extra=0 if weight is of_head else extra)
    for name, module in model.named_modules():
        if (part := _packed_in_buffers(module, itemsize)) is not None:
            yield name, module, part


def _packed_in_buffers(module: nn.Module, itemsize: int) -> Part | None:
    """The weights of a linear layer that are packed in buffers, as AWQ's and GPTQ's are; None of any other module."""
    rows, columns = getattr(module, "out_features", None), getattr(module, "in_features", None)
    buffers = list(module.buffers(recurse=False))
    if not isinstance(rows, int) or not isinstance(columns, int) or not buffers or hasattr(module, "weight"):
        return None
    number = rows * columns
    return Part(number, extra=sum(buffer.nbytes for buffer in buffers) - number * itemsize)


def count_head(head: nn.Module, model: PreTrainedModel) -> Counts:
    """Count the weights of an MTP head, which no quantisation packs. ``model``: whose head it is."""
    inside = experts = 0
    for name, weight in head.named_parameters():
        if ".experts." in name:
            experts += weight.numel()
        else:
            inside += weight.numel()
    of = count(model)
    share = of.expert_share if experts else 1.0
    return Counts(1, Part(inside), NOTHING, of.head, 0, Part(experts), share, head_rows=of.head_rows)


def packing_of(model: PreTrainedModel) -> tuple[str | None, str | None]:
    """How a loaded model's linear layers and its output embedding are packed, as ``load_model`` calls it."""
    kinds = {_PACKED.get(type(part).__name__) for _, part in _linear(model)} - {None}
    return next(iter(kinds), None), _PACKED_HEADS.get(type(model.get_output_embeddings()).__name__)


def packed_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules that a quantisation packs: the plain linear layers, but for the output embedding."""
    return [name for name, part in _linear(model) if type(part) is nn.Linear]


def _linear(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """The linear layers, packed or not, but for the output embedding."""
    head = model.get_output_embeddings()
    return [
        (name, part)
        for name, part in model.named_modules()
        if part is not head and (type(part) is nn.Linear or type(part).__name__ in _PACKED)
    ]


def note_on_unpacking(file: Path, size: int, dtype: torch.dtype, quantize: str | None) -> str:
    """A sentence about what becomes of a GGUF file on loading. ``size``: bytes of its weights in ``dtype``."""
    said = f"{file.name} ({gigabytes(file.stat().st_size)}) is unpacked to {str(dtype)[6:]} in host memory on loading"
    packed = f", and packed to {quantize} on the device, layer by layer" if quantize else ""
    return f"{said}: {gigabytes(size)}{packed}"
