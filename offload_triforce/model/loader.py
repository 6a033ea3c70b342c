"""Loading: a hub id, a local folder or a GGUF file; dtype; bitsandbytes quantisation."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from offload_triforce.errors import InputError, MemoryLimitError, UnsupportedModelError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZATIONS = ("nf4", "int8")


def resolve_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU.

    Raises:
        InputError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"unknown device {name!r}; use auto, cuda, cuda:N or cpu") from error
    if device.type not in ("cuda", "cpu"):
        raise InputError(f"device {name!r} is not supported; use auto, cuda, cuda:N or cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name!r} was asked for, but torch finds no CUDA device; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name!r} does not exist; there are {torch.cuda.device_count()} CUDA devices")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 on CUDA and float32 on a CPU.

    Raises:
        InputError: unknown name.
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise InputError(f"unknown dtype {name!r}; use auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def load_model(
    source: str, dtype: torch.dtype, device: torch.device, quantize: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer.

    Args:
        source: hub id, folder in transformers' format, GGUF file, or folder with one GGUF file in it.
        dtype: of weights and KV. device: where the weights go.
        quantize: "nf4" or "int8" (bitsandbytes), or None.

    Raises:
        InputError: not found, or not a model.
        UnsupportedModelError: a model that transformers cannot decode with.
    """
    folder, gguf = _locate(source)
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}}
    if gguf:
        if quantize:
            raise InputError(f"{source} is a GGUF file, which is quantised already; leave --quantize out")
        options |= {"gguf_file": gguf, "attn_implementation": "sdpa"} | _unpacked()
    if quantize:
        options["quantization_config"] = _quantization(quantize, dtype)
    try:
        if not gguf and AutoConfig.from_pretrained(folder).is_encoder_decoder:
            raise UnsupportedModelError(f"{source} is not a decoder-only language model but an encoder-decoder")
        tokenizer = AutoTokenizer.from_pretrained(folder, **({"gguf_file": gguf} if gguf else {}))
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise MemoryLimitError(
            f"the weights of {source} do not fit on {device} as {str(dtype)[6:]}; take --quantize nf4 "
            "or a smaller model"
        ) from error
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise _explain(source, error) from error
    return model.eval(), tokenizer


def max_positions(source: str) -> int | None:
    """The longest text a model takes, read from its configuration alone; None if it does not say.

    Raises:
        InputError: as ``load_model``.
    """
    folder, gguf = _locate(source)
    try:
        config = AutoConfig.from_pretrained(folder, **({"gguf_file": gguf} if gguf else {}))
    except (OSError, ValueError, KeyError) as error:
        raise _explain(source, error) from error
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _locate(source: str) -> tuple[str, str | None]:
    """Folder or hub id, and the GGUF file's name if it is one."""
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"no such file: {source}")
        return str(path.parent), path.name
    if path.is_dir():
        if (path / "config.json").exists():
            return str(path), None
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return str(path), files[0].name
        held = f"{len(files)} GGUF files; name one" if files else "neither config.json nor a GGUF file"
        raise InputError(f"folder {source} holds {held}")
    if path.is_file():
        raise InputError(f"{source} is a file but not a .gguf file; give a model folder, a GGUF file or a hub id")
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source:
        raise InputError(f"no such file or folder: {source}")
    return source, None


def _unpacked() -> dict[str, Any]:
    """Newer versions of transformers would keep a GGUF file's blocks, for kernels that need not be there."""
    import transformers

    kept = getattr(transformers, "GgufConfig", None)
    return {} if kept is None else {"quantization_config": kept(dequantize=True)}


def _quantization(quantize: str, dtype: torch.dtype) -> Any:
    if quantize not in QUANTIZATIONS:
        raise InputError(f"unknown quantisation {quantize!r}; use {' or '.join(QUANTIZATIONS)}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"--quantize {quantize} needs bitsandbytes; pip install 'offload-triforce[bnb]'")
    from transformers import BitsAndBytesConfig

    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _explain(source: str, error: Exception) -> Exception:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "Unrecognized configuration class" in reason or "does not recognize this architecture" in str(error):
        return UnsupportedModelError(f"{source} is not a decoder-only language model that transformers knows: {reason}")
    if isinstance(error, OSError) and not Path(source).expanduser().exists():
        return InputError(
            f"{source!r} is neither a local folder or GGUF file nor a model that the hub gives out from here ({reason})"
        )
    return InputError(f"{source} could not be loaded: {reason}")
