"""The seam to transformers: one attention function, and a model that is run over whatever cache one hands it.

The function is registered under a name that has no mask function, so transformers builds no mask. The cache
to attend over travels with each call as a keyword of our own, down to the attention function, and the model is told
``use_cache=False``: it keeps nothing itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from offload_triforce.errors import UnsupportedModelError
from offload_triforce.kernels.ops import AttentionParams
from offload_triforce.scheduler.device import to_device

ATTENTION_NAME = "offload_triforce"

# What other models pass to their attention, by the name that users know it under.
_UNSUPPORTED = {
    "s_aux": "learned attention sinks",
    "position_bias": "additive position biases",
}


class View(Protocol):
    """What one forward step attends over: a cache, seen by all layers of a model."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
        """Take one layer's new keys and values in and attend: query [H, T, D], key and value [K, T, D] -> [H, T, D]."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    triforce: View | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The registered attention function: batch 1, [1, H, T, D] in, [1, T, H, D] out."""
    if triforce is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} was called without a cache of offload-triforce: either from elsewhere while it "
            "decodes, or by a model that does not hand keywords down to its attention"
        )
    for name, feature in _UNSUPPORTED.items():
        if others.get(name) is not None:
            raise UnsupportedModelError(f"{type(module).__name__} uses {feature}, which is not supported")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    params = AttentionParams(scale, limiting_window(sliding_window, getattr(module, "config", None)), softcap)
    output = triforce.attend(module.layer_idx, query[0], key[0], value[0], params)
    return output.transpose(0, 1)[None].contiguous(), None


def limiting_window(window: int | None, config: PretrainedConfig | None) -> int | None:
    """A sliding window, if some text that the model can read is longer; else None: the layer sees everything."""
    positions = getattr(config, "max_position_embeddings", None)
    return None if window is not None and positions is not None and window >= positions else window


AttentionInterface.register(ATTENTION_NAME, _attention)


@contextmanager
def attached(*models: PreTrainedModel | None) -> Iterator[None]:
    """Run the given models with our attention; give each its own back afterwards."""
    before = [(m, m.config._attn_implementation) for m in dict.fromkeys(models) if m is not None]
    try:
        for model, _ in before:
            model.set_attn_implementation(ATTENTION_NAME)
        yield
    finally:
        for model, implementation in before:
            model.set_attn_implementation(implementation)


def run(model: PreTrainedModel, tokens: Sequence[int], positions: Sequence[int], view: View, keep: int) -> Tensor:
    """One forward step of T ``tokens`` at their ``positions``, over ``view``: the last ``keep`` logits, [keep, V]."""
    both = to_device(torch.tensor([list(tokens), list(positions)], dtype=torch.long), model.device)
    return forward(model, both[0], both[1], view, keep)


def forward(model: PreTrainedModel, ids: Tensor, positions: Tensor, view: View, keep: int) -> Tensor:
    """The same with ids and positions (int64 [T]) that are on the device already."""
    inputs = {"input_ids": ids[None], "position_ids": positions[None]}
    return model(**inputs, use_cache=False, logits_to_keep=keep, triforce=view).logits[0, -keep:]
