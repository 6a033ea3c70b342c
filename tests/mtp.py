"""A tiny hybrid with an MTP head, saved to a folder as checkpoints have it: the head's weights beside the model's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, modeling_layers

from tests.tiny import FAMILIES, build, tiny_model

needs_heads = pytest.mark.skipif(
    not hasattr(getattr(modeling_layers, "MtpModel", None), "get_weight_conversions"),
    reason="this release of transformers reads no MTP heads",
)
KINDS = ["linear_attention", "full_attention", "linear_attention", "full_attention"]


# Families whose heads are named otherwise, or have experts: class prefix, and changes to the common settings.
OTHERS = {
    "qwen3.5-moe": ("Qwen3_5Moe", {**FAMILIES["qwen3.5-moe"][1], "layer_types": KINDS}),
    "qwen3-next": ("Qwen3Next", {**FAMILIES["qwen3-next"][1], "layer_types": KINDS, "decoder_sparse_step": 1}),
    "glm4-moe": (
        "Glm4Moe",
        {
            "num_hidden_layers": 3,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "head_dim": 8,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
}


def head_weights(weights: dict[str, torch.Tensor], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights of a head for a checkpoint with these, by their names there: a full-attention layer, and what goes
    around it. Under ``mtp.``, or behind the last layer where the model has experts from some layer on.
    """
    layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("model.layers."))
    width, generator = weights["model.norm.weight"].shape[0], torch.Generator().manual_seed(seed)
    behind = any("n_routed" in name or "e_score_correction_bias" in name for name in weights)
    block, around = (f"model.layers.{layers}.", f"model.layers.{layers}.") if behind else ("mtp.layers.0.", "mtp.")
    names = ("enorm", "hnorm", "shared_head.norm", "eh_proj")
    if not behind:
        names = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm", "fc")
    last = f"model.layers.{layers - 1}."
    shapes = {block + name.removeprefix(last): part for name, part in weights.items() if name.startswith(last)}
    shapes |= {f"{around}{name}.weight": torch.zeros(width) for name in names[:3]}
    shapes[f"{around}{names[3]}.weight"] = torch.zeros(width, 2 * width)
    return {name: 0.15 * torch.randn(part.shape, generator=generator) for name, part in shapes.items()}


def save_with_head(folder: Path, family: str = "qwen3.5", leave_out: bool = False) -> Path:
    """A tiny model's folder. ``leave_out``: its configuration tells of a head that its file lacks."""
    if family in OTHERS:
        prefix, changes = OTHERS[family]
        model = build(prefix, seed=1, **{"initializer_range": 0.12, "mtp_num_hidden_layers": 1, **changes})
    else:
        model = tiny_model(family, seed=1, calm=True, layer_types=KINDS, mtp_num_hidden_layers=1)
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    if not leave_out:
        weights |= head_weights(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
