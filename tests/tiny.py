"""Tiny random models of every family: odd head counts, short windows, weights large enough that texts do not loop."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY = 101

# Six query heads on two KV heads: groups of three.
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.25,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


_LONG = {"short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [1.2, 2.0, 5.0, 9.0]}
_LONGROPE = _rope("longrope", factor=16.0, original_max_position_embeddings=128, **_LONG)

_RECURRENT = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 10,
}
_EXPERTS = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 16,
}

# Full layers with heads of another size than the sliding ones, and as in the largest, fewer of them.
_GEMMA4 = {
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "sliding_window": 37,
    "head_dim": 8,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 0,
    "tie_word_embeddings": False,
}

# Family -> (class prefix, changes to the common settings).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "Llama",
        {"num_hidden_layers": 3, "hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 12},
    ),
    "llama-llama3": (
        "Llama",
        _rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "llama-linear": ("Llama", _rope("linear", factor=4.0)),
    "llama-yarn": ("Llama", _rope("yarn", factor=4.0, original_max_position_embeddings=512)),
    "llama-longrope": ("Llama", _LONGROPE),
    "qwen2": ("Qwen2", {"num_attention_heads": 3, "num_key_value_heads": 3}),
    "qwen2-sliding": (
        "Qwen2",
        {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 45, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16, "num_attention_heads": 3, "num_key_value_heads": 1}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 8}),
    "mistral-sliding": ("Mistral", {"sliding_window": 51, "head_dim": 8}),
    "phi3": ("Phi3", {"num_key_value_heads": 3}),
    "phi3-longrope": ("Phi3", {**_LONGROPE, "original_max_position_embeddings": 128}),
    "phi3-longrope-below": (
        "Phi3",
        {
            **_rope("longrope", factor=2.0, original_max_position_embeddings=1024, **_LONG),
            "original_max_position_embeddings": 1024,
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen3-moe": (
        "Qwen3Moe",
        {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8},
    ),
    "gemma2": (
        "Gemma2",
        {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "sliding_window": 37,
            "head_dim": 10,
            "query_pre_attn_scalar": 10,
            "attn_logit_softcapping": 3.0,
            "tie_word_embeddings": False,
            "attn_implementation": "eager",  # sdpa leaves the soft-capping out
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "sliding_window": 37,
            "head_dim": 10,
            "query_pre_attn_scalar": 10,
            "tie_word_embeddings": False,
        },
    ),
    "gemma4": ("Gemma4", {**_GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1}),
    "gemma4-shared": (
        "Gemma4",
        {
            **_GEMMA4,
            "num_hidden_layers": 5,
            "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"],
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": 6,
            "vocab_size_per_layer_input": VOCABULARY,
        },
    ),
    "qwen3-next": ("Qwen3Next", {**_RECURRENT, **_EXPERTS, "decoder_sparse_step": 2}),
    "qwen3.5": ("Qwen3_5", _RECURRENT),
    "qwen3.5-moe": ("Qwen3_5Moe", {**_RECURRENT, **_EXPERTS}),
    "olmo-hybrid": ("OlmoHybrid", {**_RECURRENT, "linear_num_key_heads": 4, "rope_parameters": None}),
    "gpt-oss": (
        "GptOss",
        {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "sliding_window": 37,
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "attn_implementation": "eager",  # it has no other that knows its sinks
        },
    ),
}


# Those with recurrent layers.
RECURRENT = {"qwen3-next", "qwen3.5", "qwen3.5-moe", "olmo-hybrid"}


def tiny_config(prefix: str, **changes: Any) -> transformers.PretrainedConfig:
    name = f"{prefix}TextConfig" if prefix in ("Gemma3", "Gemma4", "Qwen3_5", "Qwen3_5Moe") else f"{prefix}Config"
    return getattr(transformers, name)(**{**_COMMON, **changes})


def build(prefix: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of a class: ``Llama`` makes a LlamaForCausalLM."""
    config = tiny_config(prefix, **changes)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(".sinks"):  # as they come, they are nearly zero: one key more that nobody looks at
                weight.normal_(2.0, 2.0)
            if name.endswith(".A_log") and weight.dim() == 1:
                # As they come, a state is gone after a token or two, and hides no mistake.
                weight.copy_(torch.linspace(-5.0, -1.5, len(weight)))
    return model


def tiny_model(family: str = "llama", seed: int = 0, calm: bool = False, **changes: Any) -> PreTrainedModel:
    """A random model of one of ``FAMILIES``.

    As it comes, the least error in the attention changes what it says, and a drafter is nearly always wrong.
    ``calm`` turns the attention down until cheap drafts are right about half of the time.
    """
    prefix, settings = FAMILIES[family]
    if not calm:
        return build(prefix, seed, **{**settings, **changes})
    model = build(prefix, seed, **{"initializer_range": 0.12, **settings, **changes})
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "o_proj" in name:
                weight *= 0.3
    return model


def disturbed(model: PreTrainedModel, noise: float, seed: int = 1) -> PreTrainedModel:
    """A copy that is right often, but not always: every weight off by ``noise`` of its matrix' spread."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in other.parameters():
            if weight.dim() > 1:
                weight += noise * weight.std() * torch.randn(weight.shape, generator=generator)
    return other


def prompt_ids(tokens: int, seed: int = 0) -> torch.Tensor:
    """Random ids [1, n], without the special ones."""
    return torch.randint(3, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(seed))


def greedy(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int, **options: Any) -> list[int]:
    """transformers' own greedy answer."""
    options = {"max_new_tokens": new_tokens, "do_sample": False, **options}
    with torch.no_grad():
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    return output[0, prompt.shape[1] :].tolist()
