"""Models that see or hear as well, read as their text decoder alone: the other parts' weights are never loaded.

Of some families (Qwen3.5 is one) transformers does that by itself. Of those here it makes the whole model or none,
though they hold their text decoder as a model of a class of its own; only the names of its weights have a prefix more.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

# Families whose text decoder is a causal language model of a class of its own, without changes.
TEXT_ALONE = ("llava", "mistral3", "gemma3", "gemma4", "gemma4_unified")

# From the names of weights in their files to those of the decoder alone: as published, and as newer files have them.
_RENAMED = {
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
    r"^model\.language_model\.": "model.",
}


def loaded_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """What is loaded of a model: its text decoder if that can be had alone and transformers does not do so by itself.

    Weights that are packed in the files stay so: the decoder is told how.
    """
    if config.model_type not in TEXT_ALONE:
        return config
    text = config.get_text_config()
    packed = getattr(config, "quantization_config", None)
    if packed is not None:
        text.quantization_config = packed
    return text


def loading_options(config: PreTrainedConfig) -> dict[str, Any]:
    """What ``from_pretrained`` has to be told for that, of a folder with this configuration."""
    text = loaded_config(config)
    return {} if text is config else {"config": text, "key_mapping": _RENAMED}
