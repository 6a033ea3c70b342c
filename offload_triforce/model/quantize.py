"""Packing the weights of a GGUF file: transformers unpacks them on loading and refuses to quantise them again.

So the model is loaded into host memory, unpacked, and its linear layers are packed one by one on the device, which
never holds more than one of them unpacked. What comes out is what transformers makes of the same weights in a folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from offload_triforce.errors import MemoryLimitError
from offload_triforce.machine.memory import free_on_host
from offload_triforce.machine.units import gigabytes
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
def pack(model: PreTrainedModel, config: BitsAndBytesConfig, device: torch.device) -> PreTrainedModel:
    """Pack the linear layers of a model that lies in host memory onto ``device``, and move the rest there.

    ``config``: as for ``from_pretrained``. The model is changed, and its unpacked weights are given up on the way.
    """
    for name in packed_modules(model):
        model.set_submodule(name, _packed(model.get_submodule(name), config, device))
    model.config.quantization_config = config
    # As transformers marks what it has packed itself.
    kind = "is_loaded_in_8bit" if config.load_in_8bit else "is_loaded_in_4bit"
    setattr(model, kind, True)
    move(model, device)
    return model


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


def move(model: torch.nn.Module, device: torch.device) -> None:
    """Move what is not there yet: packed weights are. Tied ones stay tied."""
    moved: dict[int, torch.nn.Parameter] = {}
    for part in model.modules():
        for name, weight in part.named_parameters(recurse=False):
            if weight.device != device:
                if id(weight) not in moved:
                    moved[id(weight)] = torch.nn.Parameter(weight.data.to(device), weight.requires_grad)
                part.register_parameter(name, moved[id(weight)])
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = buffer.to(device)


def check_room(path: Path, header: GGUFHeader, dtype: torch.dtype, device: torch.device, quantize: str | None) -> None:
    """Refuse a GGUF file whose unpacked weights do not fit, before they are unpacked. ``header``: the file's.

    Raises:
        MemoryLimitError: how much is missing, and what would help.
    """
    size = header.parameters * dtype.itemsize
    unpacked = f"{path.name} is unpacked to {str(dtype)[6:]} on loading: {gigabytes(size)}"
    if device.type == "cuda" and quantize is None:
        free = torch.cuda.mem_get_info(device)[0]
        if size > free:
            raise MemoryLimitError(
                f"{unpacked}, but {gigabytes(free)} of the card are free, {gigabytes(size - free)} too little; "
                "--quantize nf4 packs it again, to about a quarter"
            )
    if size > (free := free_on_host()):
        raise MemoryLimitError(
            f"{unpacked}, but {gigabytes(free)} of host memory are free, {gigabytes(size - free)} too little; "
            "take a smaller model, or a folder of weights that are packed as they are read"
        )
