"""Well-known model shapes with random weights: for speed, what the weights say does not matter."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama import LlamaConfig
from transformers.models.qwen2 import Qwen2Config

from offload_triforce.errors import InputError

# Each from the model's own published config.json.
_LLAMA_2_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
_LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
_QWEN_25_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
# Llama-3.2-1B with the vocabulary of Llama-2, whose output head is a quarter as large: small enough for a CPU.
_LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}

SHAPES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama-2-7b": (LlamaConfig, _LLAMA_2_7B),
    "llama-3.1-8b": (LlamaConfig, _LLAMA_3_8B),
    "qwen2.5-7b": (Qwen2Config, _QWEN_25_7B),
    "llama-1b": (LlamaConfig, _LLAMA_1B),
}


def random_model(shape: str, dtype: torch.dtype, device: torch.device, positions: int) -> PreTrainedModel:
    """A model of a well-known shape with random weights, for texts of up to ``positions`` tokens.

    Raises:
        InputError: no such shape.
    """
    if shape not in SHAPES:
        raise InputError(f"unknown shape {shape!r}; known are {', '.join(SHAPES)}")
    kind, values = SHAPES[shape]
    config = kind(**values, max_position_embeddings=positions, tie_word_embeddings=False, dtype=dtype)
    before = torch.random.get_rng_state()
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    torch.random.set_rng_state(before)
    return model.eval()
