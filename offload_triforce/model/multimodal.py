"""Models that see or hear as well, read as their text decoder alone: the other parts' weights are never loaded.

Of some families (Qwen3.5 is one) transformers does that by itself. Of those here it makes the whole model or none,
though they hold their text decoder as a model of a class of its own; only the names of its weights have a prefix more.
"""

from __future__ import annotations

import copy
import re
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
# Where a packing names modules that stay as they are, as the whole model calls them.
_KEPT = ("modules_to_not_convert", "ignore", "llm_int8_skip_modules")


def loaded_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """What is loaded of a model: its text decoder if that can be had alone and transformers does not do so by itself.

    Weights that are packed in the files stay so: the decoder is told how.
    """
    if config.model_type not in TEXT_ALONE:
        return config
    text = config.get_text_config()
    packing = _packing(config)
    if packing is not None:
        text.quantization_config = packing
    return text


def loading_options(config: PreTrainedConfig) -> dict[str, Any]:
    """What ``from_pretrained`` has to be told for that, of a folder with this configuration."""
    text, packing = loaded_config(config), _packing(config)
    if text is not config:
        return {"config": text, "key_mapping": _RENAMED}
    if packing is None or config.get_text_config() is config:
        return {}
    config = copy.deepcopy(config)
    config.quantization_config = packing
    return {"config": config}


def _packing(config: PreTrainedConfig) -> Any:
    """How the weights in the files are packed, with the names of modules as the text decoder alone has them, too."""
    packing = getattr(config, "quantization_config", None)
    if not isinstance(packing, dict):
        return packing
    return {key: _with_own_names(value) if key in _KEPT else value for key, value in packing.items()}


def _with_own_names(names: Any) -> Any:
    if not isinstance(names, list):
        return names
    own = [_own_name(name) for name in names if isinstance(name, str)]
    return names + [name for name in own if name not in names]


def _own_name(module: str) -> str:
    """Of a module: the patterns are for weights, whose names go on with a dot."""
    name = f"{module}."
    for pattern, own in _RENAMED.items():
        if re.match(pattern, name):
            return re.sub(pattern, own, name).removesuffix(".")
    return module
