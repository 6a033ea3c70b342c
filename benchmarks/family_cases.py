"""What is tried of each family: its own kind of layers, and the settings that change how it attends."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from benchmarks.tiny_families import LAYERS, tiny_config
from benchmarks.tiny_sizes import SIZES

_SLIDING = ["sliding_attention", "full_attention"] * (LAYERS // 2)
_FULL = ["full_attention"] * LAYERS
_WINDOW = SIZES["sliding_window"]
_NO_RECURRENCE = {"attention layers alone": {"layer_types": _FULL}}
_BIDIRECTIONAL = {"bidirectional": {"use_bidirectional_attention": True}}
_GEMMA4 = {
    "bidirectional": {"use_bidirectional_attention": "all"},
    "bidirectional within images": {"use_bidirectional_attention": "vision"},
    "shared keys and values": {"num_kv_shared_layers": 2},
    "values are keys": {"attention_k_eq_v": True},
    "experts": {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24},
}
_LONG = {"short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [1.2, 2.0, 5.0, 9.0], "factor": 2.0}


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


# Settings of single families, by what they are called in the tables.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "bamba": {"attention layers alone": {"attn_layer_indices": list(range(LAYERS))}},
    "deepseek_v2": {"values as large as keys": {"v_head_dim": 16}},
    "deepseek_v3": {"values as large as keys": {"v_head_dim": 16}},
    "gemma": _BIDIRECTIONAL,
    "gemma2": {**_BIDIRECTIONAL, "strong soft-capping": {"attn_logit_softcapping": 1.0}},
    "gemma3_text": _BIDIRECTIONAL,
    "gemma4_text": {**_GEMMA4, "wide feed-forward": {"use_double_wide_mlp": True, "num_kv_shared_layers": 2}},
    "gemma4_unified_text": _GEMMA4,
    "granitemoehybrid": _NO_RECURRENCE,
    "jamba": {"attention layers alone": {"attn_layer_period": 1, "attn_layer_offset": 0}},
    "lfm2": {"convolutions": {"layer_types": ["conv", "full_attention"] * 2}},
    "lfm2_moe": _NO_RECURRENCE,
    "lfm3": _NO_RECURRENCE,
    "llama": {
        "bidirectional": {"is_causal": False},
        "linear": _rope("linear", factor=4.0),
        "dynamic NTK": _rope("dynamic", factor=4.0),
        "YaRN": _rope("yarn", factor=4.0, original_max_position_embeddings=512),
        "longrope": _rope("longrope", original_max_position_embeddings=1024, **_LONG),
        "no GQA": {"num_key_value_heads": 6},
        "one KV head": {"num_key_value_heads": 1},
        "pretraining_tp": {"pretraining_tp": 2},
    },
    "minimax": _NO_RECURRENCE,
    "minimax_m3_vl_text": {"sparse layers": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2}},
    "nemotron_h": _NO_RECURRENCE,
    "qwen3_5_text": _NO_RECURRENCE,
    "qwen3_next": _NO_RECURRENCE,
}

# Booleans that do not change what a model says, or what it is.
_IDLE = {"use_cache", "return_dict", "output_hidden_states", "output_attentions", "output_router_logits"}
_IDLE |= {"tie_word_embeddings", "is_encoder_decoder", "is_decoder", "add_cross_attention"}


@dataclass(frozen=True)
class Case:
    """One configuration to try: a family and what is changed about it. ``variant`` is empty for the family as it is."""

    model_type: str
    variant: str = ""
    changes: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def cases_of(model_type: str, flips: bool = False) -> list[Case]:
    """The family as it is, with and without a sliding window, and its variants.

    ``flips``: also with every boolean of its configuration turned, one at a time.
    """
    cases = [Case(model_type)]
    try:
        text = tiny_config(model_type).get_text_config()
    except Exception:  # what is the matter is said where the case is tried
        return cases
    cases += _window_cases(model_type, text)
    cases += [Case(model_type, name, changes) for name, changes in VARIANTS.get(model_type, {}).items()]
    if flips:
        for name, value in vars(text).items():
            if isinstance(value, bool) and name not in _IDLE and not name.startswith("_"):
                cases.append(Case(model_type, f"{name}={not value}", {name: not value}))
    return cases


def _window_cases(model_type: str, text: PreTrainedConfig) -> list[Case]:
    settings, kinds = vars(text), vars(text).get("layer_types")
    if "sliding_window" not in settings or not set(kinds or _SLIDING) <= set(_SLIDING):
        return []
    switch = {"use_sliding_window": True} if "use_sliding_window" in settings else {}
    with_window = {**switch, "sliding_window": _WINDOW} | ({} if kinds is None else {"layer_types": _SLIDING})
    without = {"use_sliding_window": False} if switch else {}
    without |= {"sliding_window": None} if kinds is None else {"layer_types": _FULL}
    slides = "sliding_attention" in kinds if kinds else settings["sliding_window"] and (not switch)
    return [
        Case(model_type, "full layers alone", without) if slides else Case(model_type, "sliding window", with_window)
    ]
