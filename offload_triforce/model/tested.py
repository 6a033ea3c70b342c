"""The model types that were tried against transformers' own ``generate`` and came out equal, token for token.

The page of models (docs/models.md) says the same and how to try again. Of these the code of transformers is known to
hand its attention all that it attends by; any other model is checked before it is used (``runtime/self_check.py``).
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TESTED = frozenset(
    [
        "afmoe",
        "apertus",
        "apertus1p5_text",
        "arcee",
        "aria_text",
        "beam",
        "biogpt",
        "bitnet",
        "codegen",
        "cohere",
        "cohere2",
        "cohere2_moe",
        "cohere_compass_text",
        "ctrl",
        "cwm",
        "dbrx",
        "dots1",
        "emu3",
        "ernie4_5",
        "ernie4_5_moe",
        "exaone",
        "exaone4",
        "exaone_moe",
        "flex_olmo",
        "flint",
        "fuyu",
        "gemma",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "gemma4",
        "gemma4_text",
        "gemma4_unified",
        "gemma4_unified_text",
        "glm",
        "glm4",
        "glm4_moe",
        "got_ocr2",
        "gpt-sw3",
        "gpt2",
        "gpt_bigcode",
        "gpt_neox",
        "gpt_oss",
        "gptj",
        "granite",
        "granite_swa",
        "granitemoe",
        "granitemoe_swa",
        "granitemoeshared",
        "helium",
        "hunyuan_v1_dense",
        "hunyuan_v1_moe",
        "hy_v3",
        "hyperclovax",
        "internlm3",
        "iquestcoder",
        "jais2",
        "jetmoe",
        "kolibri1",
        "laguna",
        "lfm2",
        "llama",
        "mellum",
        "mimo_v2_flash",
        "minimax_m2",
        "minimax_m3_vl_text",
        "ministral",
        "ministral3",
        "mistral",
        "mixtral",
        "nanochat",
        "olmo",
        "olmo2",
        "olmo3",
        "olmo_hybrid",
        "olmoe",
        "opt",
        "persimmon",
        "phi",
        "phi3",
        "phi4_multimodal",
        "phimoe",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_moe",
        "qwen3_next",
        "sarvam_moe",
        "seed_oss",
        "smollm3",
        "solar_open",
        "starcoder2",
        "vaultgemma",
    ]
)

# Where the code of a tested family comes from. What packs weights puts layers of its own in the place of linear ones.
_KNOWN_CODE = ("transformers.", "torch.", "bitsandbytes.", "offload_triforce.")


def is_tested(model: PreTrainedModel) -> bool:
    """Whether a model is of a tested family, in the code that was tried: all of its modules are transformers' own.

    A model that sees may hold a text decoder of any family: that one counts as well.
    """
    kinds = {model.config.model_type, model.config.get_text_config().model_type}
    kinds = {kind for kind in kinds if kind == model.config.model_type or kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    return kinds <= TESTED and all(map(_is_known, model.modules()))


def _is_known(module: nn.Module) -> bool:
    """accelerate's hooks replace a module's ``forward``, and say so; what others put there may do anything."""
    replaced = "forward" in vars(module) and not hasattr(module, "_hf_hook")
    return type(module).__module__.startswith(_KNOWN_CODE) and not replaced
