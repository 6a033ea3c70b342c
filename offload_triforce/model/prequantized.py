"""Checkpoints whose weights are packed in their files (``quantization_config``): transformers unpacks or runs them.

What that needs (a package, a card) is asked of transformers' own quantiser and said before any weight is read.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig
from transformers.quantizers import auto
from transformers.utils import is_kernels_available

from offload_triforce.errors import InputError, MemoryLimitError, UnsupportedModelError
from offload_triforce.machine.memory import free_on_host
from offload_triforce.machine.units import gigabytes
from offload_triforce.model.counts import check_packed_once
from offload_triforce.model.multimodal import loaded_config

# Packages that transformers imports without saying what to install.
_INSTALL = {"compressed_tensors": "compressed-tensors>=0.15"}
# Methods whose products transformers looks for only in the first step: in what the package ``kernels`` brings.
_KERNELS = ("fp8", "mxfp8")
# The first compute capability for which weights stay packed, where older cards have them written out in 16 bits.
_STAYS_FROM = {"fp8": 89, "mxfp8": 89, "mxfp4": 75}
_LONGEST = 300


@dataclass(frozen=True)
class Packed:
    """How a checkpoint's weights are packed.

    Attributes:
        method: as transformers calls it. unpacked: whether they are written out in the model's dtype on loading, or in
            the first step.
    """

    method: str
    unpacked: bool


def method_of(config: PretrainedConfig) -> str | None:
    """How the weights of a checkpoint are packed, as its configuration says; None if they are not."""
    found = _described(config)
    if found is None:
        return None
    if found.get("load_in_8bit") or found.get("load_in_4bit"):
        return "bitsandbytes_4bit" if found.get("load_in_4bit") else "bitsandbytes_8bit"
    method = found.get("quant_method")
    return str(getattr(method, "value", method) or "a method that is not named")


def check_packed(
    config: PretrainedConfig,
    source: str,
    device: torch.device,
    quantize: str | None = None,
    quantize_head: str | None = None,
) -> Packed | None:
    """Refuse a packed checkpoint that could not be loaded onto ``device``; None if it is not packed.

    Raises:
        UnsupportedModelError: packed in a way that this release of transformers does not know.
        InputError: something is missing here, or it is to be packed again.
    """
    method = method_of(config)
    if method is None:
        return None
    _check_method(method, source)
    check_packed_once(source, method, quantize, quantize_head)
    quantizer = _allowed(lambda: _quantizer(config, device), method, source)
    unpacked = _unpacks(quantizer)
    if method in _KERNELS and not unpacked and device.type == "cuda" and not is_kernels_available():
        raise InputError(
            _lacking(source, method, "the package kernels is missing, or another version; pip install kernels")
        )
    if method.startswith("bitsandbytes"):
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns anew in each matrix product
    return Packed(method, unpacked)


def check_known(config: PretrainedConfig, source: str) -> str | None:
    """How the weights are packed, for planning: on whatever machine that will be. None if they are not.

    Raises:
        UnsupportedModelError: in a way that this release of transformers does not know.
    """
    method = method_of(config)
    if method is not None:
        _check_method(method, source)
    return method


def stays_packed(method: str, cc: int) -> bool:
    """Whether weights stay packed on a card of that compute capability (89 for 8.9), with all that transformers needs
    for it installed.
    """
    return method != "compressed-tensors" and cc >= _STAYS_FROM.get(method, 0)


def check_unpacked_room(packed: Packed, source: str, size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse weights that do not fit once they are written out. ``size``: bytes of all of them in ``dtype``.

    Raises:
        MemoryLimitError: how much is missing, and what would help.
    """
    if not packed.unpacked:
        return
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_on_host()
    if size > free:
        needed = packed.method == "mxfp4" and device.type == "cuda" and not is_kernels_available()
        keeping = "pip install kernels, with which they stay packed, or " if needed else ""
        raise MemoryLimitError(
            f"transformers writes the weights of {source} ({packed.method}) out in {str(dtype)[6:]} on this machine: "
            f"{gigabytes(size)}, but {gigabytes(free)} are free on {device}, {gigabytes(size - free)} too little; "
            f"{keeping}take --quantize nf4 of the same model in 16 bits, or a smaller model"
        )


def _described(config: PretrainedConfig) -> dict[str, Any] | None:
    found = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    if found is None:
        return None
    return found if isinstance(found, dict) else found.to_dict()


def _check_method(method: str, source: str) -> None:
    if method not in {*auto.AUTO_QUANTIZER_MAPPING, "bitsandbytes"}:
        known = ", ".join(sorted(auto.AUTO_QUANTIZER_MAPPING))
        raise UnsupportedModelError(
            f"the weights of {source} are packed by {method!r}, which transformers {transformers.__version__} does not "
            f"read; it knows {known}"
        )


def _quantizer(config: PretrainedConfig, device: torch.device) -> Any:
    """The one that ``from_pretrained`` will make, having looked at this machine."""
    described = copy.deepcopy(_described(loaded_config(config)))
    quantizer = auto.AutoHfQuantizer.from_config(described, pre_quantized=True)
    quantizer.validate_environment(device_map={"": str(device)}, weights_only=True)
    return quantizer


def _allowed(make: Callable[[], Any], method: str, source: str) -> Any:
    """What transformers makes; whatever it raises instead, as one sentence of ours."""
    try:
        return make()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        install = f"; pip install '{_INSTALL.get(package, package)}'" if package else ""
        raise InputError(_lacking(source, method, f"the package {package or error} is missing{install}")) from error
    except Exception as error:  # each method has errors of its own
        raise InputError(_lacking(source, method, _one_sentence(error))) from error


def _lacking(source: str, method: str, reason: str) -> str:
    return f"the weights of {source} are packed ({method}), and cannot be read here: {reason}"


def _one_sentence(error: Exception) -> str:
    said = " ".join(str(error).split()) or type(error).__name__
    first = said.partition(". ")[0].rstrip(".:")
    rest = said[len(first) :].lstrip(".: ")
    if "`pip install" not in first and (start := rest.find("`pip install")) >= 0:  # what to do about it
        first += "; " + rest[start + 1 :].partition("`")[0]
    return first if len(first) <= _LONGEST else f"{first[:_LONGEST].rpartition(' ')[0]} ..."


def _unpacks(quantizer: Any) -> bool:
    """Whether the weights end up in the model's dtype: FP8 and MXFP4 do where this machine has no product of them, and
    compressed tensors in the first step, but for FP8 where that has one.
    """
    if getattr(quantizer.quantization_config, "dequantize", False):
        return True
    method = getattr(quantizer.quantization_config, "quant_method", None)
    return getattr(method, "value", method) == "compressed-tensors" and not getattr(quantizer, "use_fp8_kernel", False)
