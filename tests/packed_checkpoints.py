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


def pack_compressed(plain: Path, folder: Path, group: int = 16, keep: str = "no module") -> None:
    """A copy in 4 bits, as compressed-tensors packs them, but for the output embedding and the module ``keep``."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    weights = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=group, symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    packing = QuantizationConfig(
        config_groups={"all": scheme}, ignore=["lm_head", keep], quantization_status="frozen", format="pack-quantized"
    )
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    apply_quantization_config(model, packing)
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            groups = module.weight.data.reshape(len(module.weight), -1, group)
            module.weight_scale.data.copy_(groups.abs().amax(-1) / 7)
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format="pack-quantized")
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    byte_tokenizer().save_pretrained(folder)
