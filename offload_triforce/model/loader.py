"""Loading: a hub id, a local folder or a GGUF file; dtype; bitsandbytes quantisation."""

from __future__ import annotations

import importlib.util
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from offload_triforce.errors import InputError, MemoryLimitError, TriForceError, UnsupportedModelError
from offload_triforce.model.blank import blank_model, probe_blank
from offload_triforce.model.counts import check_head_quantization
from offload_triforce.model.embeddings import own_embedding
from offload_triforce.model.fetch import find_source
from offload_triforce.model.gguf_header import GGUFHeader
from offload_triforce.model.gguf_skim import skimming
from offload_triforce.model.hub import access, bounded, is_here
from offload_triforce.model.local_files import check_files, locate
from offload_triforce.model.multimodal import loaded_config, loading_options
from offload_triforce.model.packed_head import kept_in_host_memory, pack_head
from offload_triforce.model.packing import check_packing
from offload_triforce.model.prequantized import check_packed, check_unpacked_room
from offload_triforce.model.quantize import check_room, move, pack
from offload_triforce.model.text_part import maker
from offload_triforce.model.to_host import move_embeddings
from offload_triforce.model.weights import DTYPES, count

# Let transformers say which weights did not fit, instead of pointing to its log.
_REPORTING = {"output_loading_info": True, "ignore_mismatched_sizes": True}
# Where a GGUF file names tokens that end an answer: of a text, a turn, a message. transformers reads the first alone.
_ENDS = tuple(f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom"))


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
    source: str,
    dtype: torch.dtype,
    device: torch.device,
    quantize: str | None = None,
    quantize_head: str | None = None,
    host_embeddings: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer.

    Args:
        source: a name of ``model.names``, hub id, folder in transformers' format, GGUF file, or folder with one in it.
        dtype: of weights and KV. device: where the weights go.
        quantize: "nf4" or "int8" (bitsandbytes), or None. A GGUF file is unpacked first, in host memory.
        quantize_head: "int8", of the output embedding (``packed_head``), or None.
        host_embeddings: leave the input embeddings in host memory, if they can be there (``to_host``).

    Raises:
        InputError: not found, or not a model.
        MemoryLimitError: not enough memory for the weights.
        UnsupportedModelError: a model that transformers cannot decode with.
    """
    check_packing(quantize, quantize_head)
    source = find_source(source)
    with access(source):
        model, tokenizer = _load(source, dtype, device, quantize, quantize_head, host_embeddings)
    return model.eval(), tokenizer


def _load(
    source: str,
    dtype: torch.dtype,
    device: torch.device,
    quantize: str | None,
    quantize_head: str | None,
    host_embeddings: bool,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    folder, gguf = locate(source)
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}}
    packing = _quantization(quantize, dtype) if quantize else None
    header = check_files(folder, gguf)
    if header is not None:
        check_room(Path(folder) / gguf, header, dtype, device, quantize, quantize_head, host_embeddings)
        options |= {"gguf_file": gguf, "attn_implementation": "sdpa"} | _unpacked()
    if gguf and (quantize or quantize_head or host_embeddings):
        # transformers does not quantise what it unpacks from a GGUF file: it is packed from host memory.
        options["device_map"] = {"": torch.device("cpu")}
    elif packing is not None:
        options["quantization_config"] = packing
    part, placing, kind = "configuration", nullcontext(options["device_map"]), AutoModelForCausalLM
    try:
        if not gguf:  # a model that is refused is refused before its weights are read
            config = AutoConfig.from_pretrained(folder)
            packed = check_packed(config, source, device, quantize, quantize_head)
            blank = blank_model(config, dtype)
            probe_blank(blank)
            if packed is not None:
                size = count(blank).weights(dtype.itemsize, None).total
                check_unpacked_room(packed, source, size, dtype, device)
            check_head_quantization(quantize_head, count(blank).tied)
            options |= loading_options(config)
            kind = maker(loaded_config(config))
            kept = [blank.get_output_embeddings()] if quantize_head is not None else []
            if host_embeddings and (own := own_embedding(blank)) is not None:
                kept.append(own)
            placing = kept_in_host_memory(blank, device, kept)
        part = "tokenizer"
        tokenizer = AutoTokenizer.from_pretrained(folder, **({"gguf_file": gguf} if gguf else {}))
        part = "weights"
        with placing as options["device_map"], skimming():  # the vocabulary has been read by now
            model, found = kind.from_pretrained(folder, **_REPORTING, **options)
        _check_all_found(source, found)
        _pack(model, packing if gguf else None, quantize_head, device, host_embeddings)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise MemoryLimitError(
            f"the weights of {source} do not fit on {device} as {str(dtype)[6:]}; take --quantize nf4 "
            "or a smaller model"
        ) from error
    except TriForceError:
        raise
    except Exception as error:  # whatever a file that somebody wrote makes of transformers and tokenizers
        raise _explain(source, part, error) from error
    if header is not None:
        _end_answers(model, header)
    return model, tokenizer


def _pack(
    model: PreTrainedModel, packing: Any, quantize_head: str | None, device: torch.device, host_embeddings: bool
) -> None:
    """Pack what is not packed yet, and move the model to where it belongs. ``packing``: of its linear layers."""
    if quantize_head is not None:
        pack_head(model, device)
    if packing is not None:
        pack(model, packing, device)
    if host_embeddings:
        move(model, device, but=own_embedding(model))
        move_embeddings(model)  # what cannot be there comes up after all
    move(model, device)


def max_positions(source: str) -> int | None:
    """The longest text a model takes, read from its configuration alone; None if it does not say.

    Raises:
        InputError: as ``load_model``.
    """
    source = find_source(source)
    folder, gguf = locate(source)
    check_files(folder, gguf)
    try:
        with access(source), skimming():
            config = AutoConfig.from_pretrained(folder, **({"gguf_file": gguf} if gguf else {}))
    except Exception as error:  # as in ``load_model``
        raise _explain(source, "configuration", error) from error
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _check_all_found(source: str, found: dict[str, Any]) -> None:
    """Refuse a model in which transformers has made up weights that the files do not hold.

    ``found``: its own account.
    """
    if missing := sorted(found["missing_keys"]):
        raise InputError(
            f"the files of {source} lack {len(missing):,} of the weights that its configuration asks for, such as "
            f"{missing[0]}; get them again"
        )
    if mismatched := sorted(found["mismatched_keys"]):
        name, stored, wanted = mismatched[0]
        raise InputError(
            f"{len(mismatched):,} weights of {source} have other shapes than its configuration asks for, such as "
            f"{name}: {list(stored)}, not {list(wanted)}; get configuration and weights from one place"
        )


def _end_answers(model: PreTrainedModel, header: GGUFHeader) -> None:
    """Let every token that a GGUF file says ends an answer do so: chat models end their turns with another one."""
    known = model.generation_config.eos_token_id
    ends = list(known) if isinstance(known, (list, tuple)) else [] if known is None else [known]
    vocabulary = model.get_input_embeddings().num_embeddings
    named = [header.values.get(key) for key in _ENDS]
    ends += [token for token in named if isinstance(token, int) and 0 <= token < vocabulary]
    ends = list(dict.fromkeys(ends))
    model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends or None


def _unpacked() -> dict[str, Any]:
    """Newer versions of transformers would keep a GGUF file's blocks, for kernels that need not be there."""
    import transformers

    kept = getattr(transformers, "GgufConfig", None)
    return {} if kept is None else {"quantization_config": kept(dequantize=True)}


def _quantization(quantize: str, dtype: torch.dtype) -> Any:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns anew in each matrix product
    if importlib.util.find_spec("kernels") is not None:
        with bounded():  # importing it asks the hub for a kernel then
            importlib.import_module("bitsandbytes")
    from transformers import BitsAndBytesConfig

    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    # Scales in 8 bits: 0.37 bits less per weight, and the weights come out as near (see docs/choosing.md).
    how = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    return BitsAndBytesConfig(load_in_4bit=True, **how)


def _explain(source: str, part: str, error: Exception) -> TriForceError:
    reason = shorten(str(error))
    if type(error) is not Exception and not isinstance(error, (OSError, ValueError, RuntimeError, ImportError)):
        reason = f"{type(error).__name__}: {reason}".rstrip(": ")
    if "Unrecognized configuration class" in reason or "does not recognize this architecture" in str(error):
        return UnsupportedModelError(f"{source} is not a decoder-only language model that transformers knows: {reason}")
    if "instantiate the backend tokenizer" in reason:
        return InputError(f"{source} comes without a tokenizer (tokenizer.json); get the whole model")
    if "GGUF" in reason and "architecture" in reason:
        return UnsupportedModelError(f"{source} holds a model that transformers does not read from GGUF: {reason}")
    if isinstance(error, OSError) and not is_here(source):
        return InputError(
            f"{source!r} is neither a local folder or GGUF file nor a model that the hub gives out from here ({reason})"
        )
    return InputError(f"the {part} of {source} could not be loaded: {reason}")


def shorten(text: str, most: int = 300) -> str:
    """The first two sentences of what another library says, which may be a page, on one line."""
    line = ". ".join(" ".join(text.split()).split(". ")[:2]).rstrip(".:")
    return line if len(line) <= most else f"{line[:most].rpartition(' ')[0]} ..."
