"""Counting a model's weights, and which of them a quantisation packs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from offload_triforce.machine.units import gigabytes
from offload_triforce.model.counts import NF4_BLOCK, NOTHING, Counts, Part

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def count(model: PreTrainedModel) -> Counts:
    """Count a model's weights. It may lie on the meta device."""
    packed = {f"{name}.weight" for name in packed_modules(model)}
    layers, text = model.get_decoder().layers, model.config.get_text_config()
    decoder = {id(weight) for weight in layers.parameters()}
    inside = experts = outside = NOTHING
    largest = 0
    for name, weight in model.named_parameters():
        number = weight.numel()
        extra = number * (weight.element_size() - model.dtype.itemsize)
        if name in packed:
            part = Part(0, number, weight.shape[0], -(-number // NF4_BLOCK), extra)
            largest = max(largest, number)
        else:
            part = Part(number, extra=extra)
        if id(weight) not in decoder:
            outside = outside.plus(part)
        elif ".experts." in name:
            experts = experts.plus(part)
        else:
            inside = inside.plus(part)
    available = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)
    chosen = getattr(text, "num_experts_per_tok", None)
    share = chosen / available if available and chosen else 1.0
    head = model.get_output_embeddings().weight.numel()
    return Counts(len(layers), inside, outside, head, largest, experts, share)


def packed_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules that a quantisation packs: the plain linear layers, but for the output embedding."""
    head = model.get_output_embeddings()
    return [name for name, part in model.named_modules() if type(part) is torch.nn.Linear and part is not head]


def note_on_unpacking(file: Path, size: int, dtype: torch.dtype, quantize: str | None) -> str:
    """A sentence about what becomes of a GGUF file on loading. ``size``: bytes of its weights in ``dtype``."""
    said = f"{file.name} ({gigabytes(file.stat().st_size)}) is unpacked to {str(dtype)[6:]} in host memory on loading"
    packed = f", and packed to {quantize} on the device, layer by layer" if quantize else ""
    return f"{said}: {gigabytes(size)}{packed}"
