"""A tiny hybrid with an MTP head, saved to a folder as checkpoints have it: the head's weights beside the model's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, modeling_layers

from tests.tiny import tiny_model

needs_heads = pytest.mark.skipif(
    not hasattr(getattr(modeling_layers, "MtpModel", None), "get_weight_conversions"),
    reason="this release of transformers reads no MTP heads",
)
KINDS = ["linear_attention", "full_attention", "linear_attention", "full_attention"]


def head_weights(model: PreTrainedModel, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights of a head, by their names in a checkpoint: a full-attention layer, and what goes around it."""
    text, generator = model.config.get_text_config(), torch.Generator().manual_seed(seed)
    last = model.get_decoder().layers[-1].state_dict()
    weights = {f"mtp.layers.0.{name}": part for name, part in last.items()}
    for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        weights[f"mtp.{name}.weight"] = torch.zeros(text.hidden_size)
    weights["mtp.fc.weight"] = torch.zeros(text.hidden_size, 2 * text.hidden_size)
    return {name: 0.15 * torch.randn(part.shape, generator=generator) for name, part in weights.items()}


def save_with_head(folder: Path, family: str = "qwen3.5", leave_out: tuple[str, ...] = (), **changes) -> Path:
    """A tiny model's folder. ``leave_out``: names of weights of the head that its file lacks."""
    model = tiny_model(family, seed=1, calm=True, layer_types=KINDS, mtp_num_hidden_layers=1, **changes)
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights |= {name: part for name, part in head_weights(model).items() if name not in leave_out}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["mtp_num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
