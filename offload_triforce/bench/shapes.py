"""Well-known model shapes with random weights: for speed, what the weights say does not matter."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama import LlamaConfig

from offload_triforce.errors import InputError
from offload_triforce.model.names import find_known, nearest

# Llama-3.2-1B with the vocabulary of Llama-2, whose output head is a quarter as large: small enough for a CPU.
_PARTS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_LLAMA_1B = {name: find_known("llama-3.2-1b").config[name] for name in _PARTS}
_LLAMA_1B |= {"vocab_size": 32000, "tie_word_embeddings": False}

# Beside those of ``model.names``.
SHAPES: dict[str, tuple[type, dict[str, Any]]] = {"llama-1b": (LlamaConfig, _LLAMA_1B)}


def random_model(shape: str, dtype: torch.dtype, device: torch.device, positions: int) -> PreTrainedModel:
    """A model of a well-known shape with random weights, for texts of up to ``positions`` tokens.

    Raises:
        InputError: no such shape.
    """
    limit = {"max_position_embeddings": positions}
    known = find_known(shape)
    if shape in SHAPES:
        kind, values = SHAPES[shape]
        config = kind(**values | limit)
    elif known is not None and "text_config" not in known.config:
        values = known.config | limit
        config = AutoConfig.for_model(values.pop("model_type"), **values)
    else:
        raise InputError(f"unknown shape {shape!r}; known are {', '.join(SHAPES)}, and as a model's {nearest(shape)}")
    before = torch.random.get_rng_state()
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    torch.random.set_rng_state(before)
    return model.eval()
