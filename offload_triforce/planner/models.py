"""Well-known models, so that planning needs no download; and every other one that has a configuration.

Source: each model's published config.json. What the values add up to is checked against the published number of
parameters (tests/planner/test_models.py).
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from offload_triforce.errors import InputError


@dataclass(frozen=True)
class KnownModel:
    """A model of the table: hub ids that mean it, and its configuration."""

    name: str
    ids: tuple[str, ...]
    config: dict[str, Any]


def _llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **others: Any) -> dict:
    values = {"model_type": "llama", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    values |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary}
    return values | {"tie_word_embeddings": False, "sliding_window": None} | others


def _qwen3(hidden: int, inner: int, layers: int, heads: int, kv_heads: int = 8, **others: Any) -> dict:
    own = {"model_type": "qwen3", "head_dim": 128, "max_position_embeddings": 40960, "use_sliding_window": False}
    return _llama(hidden, inner, layers, heads, kv_heads, 151936, **{**own, **others})


def _gemma3(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, head_dim: int) -> dict:
    """With the image tower (SigLIP, 400M), which transformers loads too. Five sliding layers to each full one."""
    text = _llama(hidden, inner, layers, heads, kv_heads, 262208, head_dim=head_dim, max_position_embeddings=131072)
    kinds = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(layers)]
    text |= {"model_type": "gemma3_text", "sliding_window": 1024, "layer_types": kinds, "tie_word_embeddings": True}
    images = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "image_size": 896}
    images |= {"num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False}
    return {"model_type": "gemma3", "text_config": text, "vision_config": images, "mm_tokens_per_image": 256}


_QWEN2 = {"model_type": "qwen2", "use_sliding_window": False, "max_position_embeddings": 1010000}
_MOE = {"model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
_NEMO = {"model_type": "mistral", "head_dim": 128, "max_position_embeddings": 131072}
_PHI3 = {"model_type": "phi3", "sliding_window": 262144, "max_position_embeddings": 131072}
_PHI3 |= {"original_max_position_embeddings": 4096, "pad_token_id": 32000}

MODELS = (
    KnownModel(
        "Llama-2-7B-128K",
        ("NousResearch/Yarn-Llama-2-7b-128k", "llama-7B-128K", "Llama2-7B-128K"),
        _llama(4096, 11008, 32, 32, 32, 32000, max_position_embeddings=131072),
    ),
    KnownModel(
        "Llama-3.1-8B",
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Meta-Llama-3.1-8B-Instruct"),
        _llama(4096, 14336, 32, 32, 8, 128256, max_position_embeddings=131072),
    ),
    KnownModel(
        "Qwen2.5-7B-1M",
        ("Qwen/Qwen2.5-7B-Instruct-1M",),
        _llama(3584, 18944, 28, 28, 4, 152064, **_QWEN2),
    ),
    KnownModel("Qwen3-8B", ("Qwen/Qwen3-8B",), _qwen3(4096, 12288, 36, 32)),
    KnownModel("Qwen3-14B", ("Qwen/Qwen3-14B",), _qwen3(5120, 17408, 40, 40)),
    KnownModel("Qwen3-32B", ("Qwen/Qwen3-32B",), _qwen3(5120, 25600, 64, 64)),
    KnownModel("Qwen3-30B-A3B", ("Qwen/Qwen3-30B-A3B",), _qwen3(2048, 6144, 48, 32, 4, **_MOE)),
    KnownModel(
        "Mistral-Nemo",
        ("mistralai/Mistral-Nemo-Instruct-2407", "mistralai/Mistral-Nemo-Base-2407", "Mistral-Nemo-12B"),
        _llama(5120, 14336, 40, 32, 8, 131072, **_NEMO),
    ),
    KnownModel(
        "Phi-3-mini-128K",
        ("microsoft/Phi-3-mini-128k-instruct",),
        _llama(3072, 8192, 32, 32, 32, 32064, **_PHI3),
    ),
    KnownModel("Gemma-3-4B", ("google/gemma-3-4b-it", "google/gemma-3-4b-pt"), _gemma3(2560, 10240, 34, 8, 4, 256)),
    KnownModel("Gemma-3-12B", ("google/gemma-3-12b-it", "google/gemma-3-12b-pt"), _gemma3(3840, 15360, 48, 16, 8, 256)),
    KnownModel(
        "Gemma-3-27B", ("google/gemma-3-27b-it", "google/gemma-3-27b-pt"), _gemma3(5376, 21504, 62, 32, 16, 128)
    ),
)


def find_config(source: str) -> tuple[str, PretrainedConfig]:
    """A name for people and the configuration: of a local folder, config.json or GGUF file, of the table, of the hub.

    Raises:
        InputError: nothing of that name, with the nearest names of the table.
    """
    path = Path(source).expanduser()
    if path.exists():
        return source, _read(source, path)
    plain = {_plain(name): model for model in MODELS for name in (model.name, *model.ids)}
    known = plain.get(_plain(source))
    if known is not None:
        values = dict(known.config)
        return known.name, AutoConfig.for_model(values.pop("model_type"), **values)
    if path.suffix in (".gguf", ".json") or source.startswith((".", "/", "~")):
        raise InputError(f"no such file or folder: {source}")
    if source.count("/") == 1 and (config := _from_hub(source)) is not None:
        return source, config
    near = [plain[key].name for key in difflib.get_close_matches(_plain(source), plain, 6, 0.5)]
    near = list(dict.fromkeys(near))[:3]
    hint = f"nearest are {', '.join(near)}" if near else "`offload-triforce plan --list` shows those that are known"
    raise InputError(
        f"{source!r} is neither a known model nor a local configuration nor one that the hub gives out from here; "
        f"{hint}"
    )


def _read(source: str, path: Path) -> PretrainedConfig:
    try:
        if path.suffix == ".gguf":
            return AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
        files = sorted(path.glob("*.gguf")) if path.is_dir() else []
        if files and not (path / "config.json").exists():
            return AutoConfig.from_pretrained(str(path), gguf_file=files[0].name)
        return AutoConfig.from_pretrained(str(path))
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{source} holds no configuration that transformers can read: {reason}") from error


def _from_hub(source: str) -> PretrainedConfig | None:
    """None where the hub cannot be reached, or does not know it."""
    from huggingface_hub import HfApi

    for local in (True, False):
        try:
            if not local:
                HfApi().model_info(source, timeout=5)
            return AutoConfig.from_pretrained(source, local_files_only=local)
        except Exception:  # whatever the reason, the table's nearest names are the answer
            continue
    return None


def _plain(name: str) -> str:
    """Without the organisation, capitals and separators."""
    return re.sub(r"[^a-z0-9]", "", name.split("/")[-1].lower())
