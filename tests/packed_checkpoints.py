"""Checkpoints whose weights are packed in their files, made from plain ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.byte_tokenizer import byte_tokenizer

BLOCK = 16
WEIGHTS = "model.safetensors"


def describe(folder: Path, **packing) -> None:
    """Say in a folder's configuration how its weights are packed."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": packing}))


def pack_fp8(plain: Path, folder: Path, keep: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """A copy with the projections in FP8, one scale per block, but for modules that are named in ``keep``.

    Returns what the weights are when they are unpacked.
    """
    shutil.copytree(plain, folder)
    weights = load_file(plain / WEIGHTS)
    held, unpacked = dict(weights), dict(weights)
    for name, weight in weights.items():
        rows, columns = weight.shape if weight.dim() == 2 else (1, 1)
        kept = name.removesuffix(".weight") in keep or "visual" in name or "vision" in name
        if "proj" not in name or rows % BLOCK or columns % BLOCK or kept:
            continue
        blocks = weight.float().reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        scales = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        held[name] = codes.reshape(rows, columns)
        held[f"{name}_scale_inv"] = scales
        unpacked[name] = (codes.float() * scales[:, None, :, None]).reshape(rows, columns)
    save_file(held, folder / WEIGHTS, metadata={"format": "pt"})
    packing = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    describe(folder, **packing, modules_to_not_convert=["lm_head", *keep])
    return unpacked


def pack_nf4(plain: Path, folder: Path) -> None:
    """A copy in bitsandbytes' 4 bits."""
    packing = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    options = {"quantization_config": packing, "dtype": torch.float32, "device_map": {"": "cpu"}}
    AutoModelForCausalLM.from_pretrained(plain, **options).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


# How compressed-tensors may pack: the format's name, and what becomes of weights and of what goes into a layer.
_INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
_FLOAT8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
FORMATS = {
    "int4": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": True}, None),
    "int8": ("pack-quantized", _INT8, None),
    "W8A8": ("int-quantized", _INT8, {**_INT8, "strategy": "token", "dynamic": True}),
    "FP8": ("float-quantized", _FLOAT8, {**_FLOAT8, "strategy": "token", "dynamic": True}),
}
_LARGEST = {("int", 4): 7, ("int", 8): 127, ("float", 8): 448}


def pack_compressed(plain: Path, folder: Path, kind: str = "int4", group: int = 16, keep: str = "no module") -> None:
    """A copy as compressed-tensors packs it (``FORMATS``), but for the output embedding and the module ``keep``."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    name, of_weights, of_inputs = FORMATS[kind]
    grouped = {"group_size": group} if of_weights["strategy"] == "group" else {}
    weights = QuantizationArgs(**of_weights, **grouped)
    inputs = None if of_inputs is None else QuantizationArgs(**of_inputs)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    packing = QuantizationConfig(
        config_groups={"all": scheme}, ignore=["lm_head", keep], quantization_status="frozen", format=name
    )
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    apply_quantization_config(model, packing)
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            rows, columns = module.weight.shape
            groups = module.weight.data.reshape(rows, -1, group if grouped else columns)
            module.weight_scale.data.copy_(groups.abs().amax(-1) / _LARGEST[of_weights["type"], of_weights["num_bits"]])
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format=name)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    byte_tokenizer().save_pretrained(folder)


def pack_torchao(plain: Path, folder: Path, kind: str) -> None:
    """A copy as torchao packs its weights, by the name of a configuration of its."""
    import torchao.quantization
    from transformers import TorchAoConfig

    packing = TorchAoConfig(quant_type=getattr(torchao.quantization, kind)())
    options = {"quantization_config": packing, "dtype": torch.float32, "device_map": {"": "cpu"}}
    AutoModelForCausalLM.from_pretrained(plain, **options).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
