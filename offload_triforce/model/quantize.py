"""Packing the weights of a GGUF file: transformers unpacks them on loading and refuses to quantise them again.

So the model is loaded into host memory, unpacked, and its linear layers are packed one by one on the device, which
never holds more than one of them unpacked. What comes out is what transformers makes of the same weights in a folder.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from offload_triforce.errors import MemoryLimitError
from offload_triforce.machine.memory import free_on_host
from offload_triforce.machine.units import gigabytes
from offload_triforce.model.counts import NF4_BLOCK, check_head_quantization, nf4_bytes, packing_options
from offload_triforce.model.gguf_header import GGUFHeader, read_header
from offload_triforce.model.weights import note_on_unpacking, packed_modules

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel


def note_on(file: Path, dtype: torch.dtype, quantize: str | None) -> str:
    """A sentence about what becomes of a GGUF file on loading, with its sizes.

    Raises:
        InputError: not a whole GGUF file.
    """
    return note_on_unpacking(file, read_header(file).parameters * dtype.itemsize, dtype, quantize)


@torch.no_grad()
def pack(model: PreTrainedModel, config: BitsAndBytesConfig, device: torch.device) -> None:
    """Pack the linear layers of a model that lies in host memory onto ``device``; the rest stays where it is.

    ``config``: as for ``from_pretrained``. The model is changed, and its unpacked weights are given up on the way.
    """
    for name in packed_modules(model):
        model.set_submodule(name, _packed(model.get_submodule(name), config, device))
    model.config.quantization_config = config
    # As transformers marks what it has packed itself.
    kind = "is_loaded_in_8bit" if config.load_in_8bit else "is_loaded_in_4bit"
    setattr(model, kind, True)


def _packed(linear: torch.nn.Linear, config: BitsAndBytesConfig, device: torch.device) -> torch.nn.Module:
    """The same layer in bitsandbytes' form. The weight is packed as it arrives on the device."""
    from bitsandbytes import nn

    size = linear.in_features, linear.out_features, linear.bias is not None
    if config.load_in_8bit:
        outliers = config.llm_int8_threshold
        packed = nn.Linear8bitLt(*size, has_fp16_weights=False, threshold=outliers, device="meta")
        weight = nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    else:
        how = {
            "compress_statistics": config.bnb_4bit_use_double_quant,
            "quant_type": config.bnb_4bit_quant_type,
            "quant_storage": config.bnb_4bit_quant_storage,
        }
        packed = nn.Linear4bit(*size, compute_dtype=config.bnb_4bit_compute_dtype, **how, device="meta")
        weight = nn.Params4bit(linear.weight.data, requires_grad=False, module=packed, **how)
    packed.weight = weight.to(device)
    packed.bias = linear.bias
    return packed.requires_grad_(False).eval()


def move(model: torch.nn.Module, device: torch.device, but: torch.nn.Module | None = None) -> None:
    """Move what is not there yet: packed weights are. Tied ones stay tied. ``but``: a module that stays where it is."""
    moved: dict[int, torch.nn.Parameter] = {}
    for part in model.modules():
        if part is but:
            continue
        for name, weight in part.named_parameters(recurse=False):
            if weight.device != device:
                if id(weight) not in moved:
                    moved[id(weight)] = torch.nn.Parameter(weight.data.to(device), weight.requires_grad)
                part.register_parameter(name, moved[id(weight)])
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = buffer.to(device)


# Ways to pack a model, of linear layers and output embedding, from the one that changes least.
_WAYS = ((None, "int8"), ("int8", None), ("int8", "int8"), ("nf4", None), ("nf4", "int8"))


def check_room(
    path: Path,
    header: GGUFHeader,
    dtype: torch.dtype,
    device: torch.device,
    quantize: str | None,
    quantize_head: str | None = None,
    host_embeddings: bool = False,
) -> None:
    """Refuse a GGUF file whose weights do not fit, before they are unpacked. ``header``: the file's.

    ``host_embeddings``: input embeddings of their own stay in host memory.

    Raises:
        InputError: its output embedding cannot be packed. MemoryLimitError: how much is missing, and what would help.
    """
    check_head_quantization(quantize_head, tied=not header.head)
    size = header.parameters * dtype.itemsize
    unpacked = f"{path.name} is unpacked to {str(dtype)[6:]} on loading: {gigabytes(size)}"
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        if host_embeddings:  # as many numbers as the output's, where that has its own
            header = replace(header, parameters=header.parameters - header.head)
        needed = packed_bytes(header, dtype.itemsize, quantize, quantize_head)
        if needed > free:
            packed = f", and takes {gigabytes(needed)} when it is packed" if needed < size else ""
            raise MemoryLimitError(
                f"{unpacked}{packed}, but {gigabytes(free)} of the card are free, {gigabytes(needed - free)} too "
                f"little; {_what_fits(header, dtype.itemsize, free)}"
            )
    if size > (free := free_on_host()):
        raise MemoryLimitError(
            f"{unpacked}, but {gigabytes(free)} of host memory are free, {gigabytes(size - free)} too little; "
            "take a smaller model, or a folder of weights that are packed as they are read"
        )


def packed_bytes(header: GGUFHeader, itemsize: int, quantize: str | None, quantize_head: str | None) -> int:
    """Bytes of a GGUF file's weights on the device, packed or not. Scales of rows and tables, a thousandth, are left
    out."""
    kept, size = header.parameters, 0
    if quantize is not None:
        kept -= header.packable
        blocks = header.packable // NF4_BLOCK
        size += header.packable if quantize == "int8" else nf4_bytes(header.packable, blocks)
    if quantize_head is not None:
        kept -= header.head
        size += header.head
    return size + kept * itemsize


def _what_fits(header: GGUFHeader, itemsize: int, free: int) -> str:
    ways = [way for way in _WAYS if header.head or way[1] is None]
    for way in ways:
        size = packed_bytes(header, itemsize, *way)
        if size <= free:
            return f"{packing_options(*way)} packs it to {gigabytes(size)}, which fits"
    least = packed_bytes(header, itemsize, *ways[-1])
    return f"even {packing_options(*ways[-1])} leaves {gigabytes(least)}: take a smaller model"
