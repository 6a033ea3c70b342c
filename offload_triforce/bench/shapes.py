"""Well-known model shapes with random weights: for speed, what the weights say does not matter."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama import LlamaConfig
from transformers.models.qwen3_5 import Qwen3_5TextConfig

from offload_triforce.errors import InputError
from offload_triforce.model.names import find_known, nearest

# Llama-3.2-1B with the vocabulary of Llama-2, whose output head is a quarter as large: small enough for a CPU.
_PARTS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_LLAMA_1B = {name: find_known("llama-3.2-1b").config[name] for name in _PARTS}
_LLAMA_1B |= {"vocab_size": 32000, "tie_word_embeddings": False}

# A hybrid in the proportions of Qwen3.5: three recurrent layers to each that attends, four heads to a KV head of 256.
_HYBRID_1B = {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 24, "num_attention_heads": 8}
_HYBRID_1B |= {"num_key_value_heads": 2, "head_dim": 256, "vocab_size": 32000, "tie_word_embeddings": False}
_HYBRID_1B |= {"linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_conv_kernel_dim": 4}
_HYBRID_1B |= {"linear_num_value_heads": 16, "linear_value_head_dim": 128}
_HYBRID_1B |= {"layer_types": [*["linear_attention"] * 3, "full_attention"] * 6}

# Beside those of ``model.names``.
SHAPES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama-1b": (LlamaConfig, _LLAMA_1B),
    "hybrid-1b": (Qwen3_5TextConfig, _HYBRID_1B),
}


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
