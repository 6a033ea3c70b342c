"""Recognising a loaded model again: in another process, on another device, before and after it has been running.

A hash over all weights would read all of them. What makes a model another one (training, merging, pruning, quantising)
changes nearly every number of a weight, so a sample of each tells them apart: see ``RUNS``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from offload_triforce.model.embeddings import HostEmbedding
from offload_triforce.model.identity import ModelIdentity
from offload_triforce.model.weights import count

# Of each weight, so many runs of so many neighbours, spread evenly; all of what is smaller.
RUNS, LENGTH = 16, 64
# Settings that say where a model is from or how it is run, not what it computes; how it is packed, its weights say.
_ELSEWHERE = {"architectures", "dtype", "torch_dtype", "name_or_path", "quantization_config", "transformers_version"}
_ELSEWHERE |= {"use_cache", "output_attentions", "output_hidden_states", "return_dict", "problem_type", "id2label"}
_ELSEWHERE |= {"label2id", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id"}
# Many scripts, spaces, digits and marks: tokenizers that differ in how they split or normalise differ here.
_PROBE = "The  quick fox, isn't it? 1234567 + 89.\n\tdef f(x):\n    return x\r\n Ünïcödé ﬁ 中文 русский عربى 🙂"


@torch.no_grad()
def identify(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> ModelIdentity:
    """The identity of a loaded model. It reads a few KB of each weight, from wherever it lies, and changes nothing.

    Nobody may be running the model meanwhile: packed weights are repacked by their first step on some processors.
    """
    total = count(model).weights(model.dtype.itemsize, None).parameters
    name = f"{type(model).__name__}, {total / 1e9:.2f}e9 weights"
    return ModelIdentity(name, _hash_of_configuration(model), _hash_of_weights(model), hash_of_tokenizer(tokenizer))


def _hash_of_configuration(model: PreTrainedModel) -> str:
    text = model.config.get_text_config()
    settings = {"class": type(model).__name__, **_settled(text.to_dict())}
    return _digest(json.dumps(settings, sort_keys=True, default=str).encode())


def _settled(value: Any) -> Any:
    """Without what does not matter, and without what is not set: a newer transformers adds such settings."""
    if isinstance(value, dict):
        kept = {str(key): _settled(part) for key, part in value.items() if not _elsewhere(str(key))}
        return {key: part for key, part in kept.items() if part is not False and part not in (None, [], {})}
    if isinstance(value, (list, tuple)):
        return [_settled(part) for part in value]
    return value


def _elsewhere(key: str) -> bool:
    return key.startswith("_") or key in _ELSEWHERE


def _hash_of_weights(model: nn.Module) -> str:
    """Over the names, shapes and samples of all weights, in the order of their names."""
    whole = xxhash.xxh3_128()
    for name, shape, sample in sorted(_samples(model), key=lambda found: found[0]):
        whole.update(f"{name} {sample.dtype} {tuple(shape)}\n".encode())
        whole.update(sample.reshape(-1).contiguous().cpu().view(torch.uint8).numpy())
    return whole.hexdigest()


def _samples(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
    """Name, shape and sample of each parameter and of each buffer that is saved with a model."""
    seen: set[int] = set()  # tied weights, which have two names
    for path, module in model.named_modules():
        for name, weight in _own_weights(module):
            if id(weight) in seen:
                continue
            seen.add(id(weight))
            full = f"{path}.{name}"
            kind = type(module).__name__
            if kind == "Linear4bit" and name == "weight" and getattr(weight, "quant_state", None) is not None:
                codes, scales = _sample_of_4bit(weight)
                shape = tuple(weight.quant_state.shape)
                yield full, shape, codes
                yield f"{full}.absmax", shape, scales
            elif kind == "Linear8bitLt" and name == "weight" and (scale := _scale_of_8bit(module)) is not None:
                yield full, tuple(weight.shape), sample_of(weight.data)
                yield f"{full}.scale", tuple(scale.shape), sample_of(scale)
            else:
                yield full, tuple(weight.shape), sample_of(weight)


def _own_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    transient = module._non_persistent_buffers_set  # made anew on loading; rotary modules change theirs as they run
    for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
        if name not in transient:
            yield name, buffer
    if isinstance(module, HostEmbedding):  # what it stands in for was a parameter of that name
        yield "weight", module.weight


def sample_of(weight: Tensor) -> Tensor:
    """Some of a weight's numbers, (m,), where it lies: always the same ones."""
    if not weight.numel():
        return weight.reshape(-1)
    places = _places(weight.numel()).to(weight.device)
    flat = weight.detach()
    if flat.is_contiguous():
        return flat.view(-1)[places]
    return flat[torch.unravel_index(places, flat.shape)]


@lru_cache(maxsize=256)
def _places(numbers: int) -> Tensor:
    """Indices of a sample of so many numbers: evenly spread runs, from the first number to the last."""
    if numbers <= RUNS * LENGTH:
        return torch.arange(numbers)
    starts = [(numbers - LENGTH) * run // (RUNS - 1) for run in range(RUNS)]
    return (torch.tensor(starts)[:, None] + torch.arange(LENGTH)).reshape(-1)


def _sample_of_4bit(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of sampled weights and their blocks' scales, of bitsandbytes' ``Params4bit`` of shape [rows, columns].

    On processors with bfloat16 products the first step packs them in another order and rounds the scales to bfloat16
    for good: so both are looked up by where a weight stands in the matrix, and scales are compared as bfloat16.
    """
    state = weight.quant_state
    rows, columns = state.shape[-2:]
    places = _places(rows * columns).to(weight.device)
    row, column = places // columns, places % columns
    packed = weight.data.contiguous().view(torch.uint8).reshape(-1)
    scales = state.absmax
    if getattr(state, "packing_format_for_cpu", False):
        # Blocks of 32 rows; of each pair of columns, 64 codes: the first 32 in the low halves of 32 bytes.
        group, within = row // 32 * (columns // 2) + column // 2, row % 32 * 2 + column % 2
        byte, high = packed[group * 32 + within % 32], within >= 32
        own = scales[column // state.blocksize, row]
    else:
        if state.nested:
            from bitsandbytes.functional import dequantize_blockwise

            scales = dequantize_blockwise(scales, state.state2) + state.offset
        byte, high = packed[places // 2], places % 2 == 0
        own = scales.reshape(-1)[places // state.blocksize]
    return torch.where(high, byte >> 4, byte & 15), own.to(torch.bfloat16)


def _scale_of_8bit(module: nn.Module) -> Tensor | None:
    """The scales of bitsandbytes' ``Linear8bitLt``, which its first step moves from the weight to the module."""
    before = getattr(module.weight, "SCB", None)
    return before if before is not None else module.state.SCB


def hash_of_tokenizer(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Over the vocabulary, and over what becomes of a text that tokenizers like to differ in; empty of None."""
    if tokenizer is None:
        return ""
    words = sorted((number, word) for word, number in tokenizer.get_vocab().items())
    return _digest(json.dumps([words, tokenizer.encode(_PROBE)]).encode())


def _digest(data: bytes) -> str:
    return xxhash.xxh3_128(data).hexdigest()
