"""Small sizes for every family of models, by the names that configurations use."""

from __future__ import annotations

from typing import Any

# Six query heads on two KV heads: groups of three. A window that some hundred tokens outgrow many times.
SIZES: dict[str, Any] = {
    "vocab_size": 101,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd"), 48),
    **dict.fromkeys(("intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim", "ffn_hidden_size"), 80),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 24),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 6),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 6),
    "num_key_value_heads": 2,
    "head_dim": 8,
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 2048),
    "sliding_window": 24,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    "rotary_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,  # else many a random model repeats what it reads
}
# Set where a configuration leaves it open, too.
EVEN_IF_NONE = {
    "n_routed_experts",
    "num_experts_per_tok",
    "num_key_value_heads",
    "head_dim",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
}

_NESTED_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 24, "mamba_d_state": 8, "mamba_chunk_size": 16}
_DELTA = {f"linear_{what}_head_dim": 8 for what in ("key", "value")}
_DELTA |= {f"linear_num_{what}_heads": 2 for what in ("key", "value")}
_QWEN4 = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8}
_QWEN4 |= {"indexer_compress_ratio": 4, "hc_lowrank": 8, **_DELTA}
_PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 101}
_GEMMA3N = {**_PER_LAYER, "num_kv_shared_layers": 0, "altup_num_inputs": 2, "laurel_rank": 8, "rope_parameters": None}
_GEMMA4 = {**_PER_LAYER, "per_layer_config": {1: {"head_dim": 16}, 3: {"head_dim": 16}}}
_ASSISTANT = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 0}
_DOTS3 = {"layer_types": ["indexed_attention", "sliding_attention"] * 2, "index_head_dim": 8, "index_n_heads": 2}
_DOTS3 |= {"index_topk": 8, "shared_experts_intermediate_size": 24, "head_dim": 16}
_DOTS3 |= {f"swa_{name}": 6 for name in ("num_attention_heads", "num_key_value_heads")}
_DOTS3 |= {f"swa_{name}": 16 for name in ("q_lora_rank", "kv_lora_rank", "head_dim")}
_DOTS3 |= {f"swa_{name}": 8 for name in ("qk_nope_head_dim", "v_head_dim")}
_INKLING = {"swa_num_attention_heads": 6, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "sliding_window_size": 24}
_INKLING |= {"unpadded_vocab_size": 101, "d_rel": 4, "rel_extent": 64}
_KIMI = {"linear_head_dim": 8, "linear_num_heads": 2, "linear_conv_kernel_dim": 4}
_AXES = {**_NESTED_ROPE, "mrope_section": [2, 1, 1]}
_AXES_OF_ERNIE = {**_NESTED_ROPE, "mrope_section": [1, 1, 2]}
_ON_AXES = {"text_config": {"rope_parameters": _AXES}}
_QWEN_OMNI = {"text_config": {"rope_parameters": _AXES, "head_dim": 8}, "vision_start_token_id": 99}

# What a default configuration cannot be made without.
NEEDED: dict[str, dict[str, Any]] = {"gemma4_assistant": {"text_config": {"model_type": "gemma4_text", **_ASSISTANT}}}

# What else a family needs, by its model type.
ADJUSTMENTS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"] * 2, "head_dim": 16},
    "bamba": {**_MAMBA, "attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "chameleon": {"vocabulary_map": {"<image>": 100}},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": _NESTED_ROPE}}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _NESTED_ROPE}},
    "cosmos3_edge": _ON_AXES,
    "cpmant": {"dim_ff": 80, "dim_head": 8},
    "ctrl": {"dff": 80},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "dory": {"n_input_layers": 1, "n_output_layers": 1, "n_recurrent_layers": 2},
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {"adapter_in_dim": 48, "adapter_out_dim": 48},
        "audio_config": {"adapter_input_size": 48, "adapter_out_dim": 48},
    },
    "dots3_note_text": _DOTS3,
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": _AXES_OF_ERNIE, "moe_intermediate_size": [24, 16]}},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 12}},
    "gemma3n": {"text_config": _GEMMA3N},
    "gemma3n_text": _GEMMA3N,
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_assistant": {"text_config": {**_GEMMA4, **_ASSISTANT}},
    "gemma4_text": _GEMMA4,
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": 4}},
    "glm46v": _ON_AXES,
    "glm4v": _ON_AXES,
    "glm4v_moe": {"text_config": {"rope_parameters": {**_AXES, "partial_rotary_factor": 0.5}, "head_dim": 16}},
    "glm_ocr": _ON_AXES,
    "glmga": _ON_AXES,
    "granite4_vision": {"deepstack_layer_map": [[0, 1]], "spatial_target_layers": [2]},
    "granite_docling": {"vision_config": {"out_hidden_size": 48}},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"] * 2},
    "hunyuan_vl": {"text_config": {"rope_parameters": _AXES, "head_dim": 8}},
    "inkling2": {"text_config": _INKLING, "vision_config": {"text_hidden_size": 48}},
    "inkling2_loop": {"text_config": _INKLING, "vision_config": {"text_hidden_size": 48}},
    "inkling2_loop_text": _INKLING,
    "inkling2_text": _INKLING,
    "inkling_text": _INKLING,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "jetmoe": {"num_attention_heads": 4, "kv_channels": 8},
    "kimi_linear": _KIMI,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "mamba2": {"num_heads": 4, "head_dim": 24, "state_size": 8, "n_groups": 1},
    "mimo_v2_flash": {"v_head_dim": 8, "num_attention_heads": 12},  # sliding layers double the KV heads
    "molmo2": {"adapter_config": {"vision_feature_layer": [2, 1], "text_hidden_size": 48}},
    "muse_spark": {"audio_config": {"out_hidden_size": 48}, "vision_config": {"out_hidden_size": 48}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "paddleocr_vl": _ON_AXES,
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "qwen2_5_omni_thinker": _QWEN_OMNI,
    "qwen2_5_vl": _ON_AXES,
    "qwen2_vl": _ON_AXES,
    "qwen3_asr": {"eos_token_id": []},
    "qwen3_omni_moe_thinker": _QWEN_OMNI,
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attention_head_size": 8, "feed_forward_size": 80},
    "roc_bert": {"pronunciation_vocab_size": 50, "shape_vocab_size": 50},
    "step3p7": {"text_config": {"sliding_window": 24}},
    "xlm": {"emb_dim": 48, "causal": True},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
