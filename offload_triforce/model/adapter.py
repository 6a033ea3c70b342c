"""The seam to transformers: one attention function, and a model that is run over whatever cache one hands it.

The function is registered under a name that has no mask function, so transformers builds no mask. The cache
to attend over travels with each call as a keyword of our own, down to the attention function, and the model is told
``use_cache=False``: it keeps nothing itself.

What a model tells its attention function beyond queries, keys and values says how it attends. We honour scaling,
window, soft-capping and learned sinks (``s_aux``); whatever else arrives is refused, unless it is known to change
nothing. The probe reads two tokens, so that this happens before any work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from offload_triforce.errors import UnsupportedModelError
from offload_triforce.kernels.ops import AttentionParams
from offload_triforce.model.attach import ATTENTION_NAME, Attachment, attached
from offload_triforce.model.embeddings import embed
from offload_triforce.model.windows import limiting_window
from offload_triforce.scheduler.device import to_device

__all__ = ["ATTENTION_NAME", "Attachment", "View", "attached", "forward", "run"]

# What other models pass to their attention, by the name that users know it under.
_UNSUPPORTED = {
    "sinks": "attention sinks that are computed for each token",
    "position_bias": "additive position biases",
    "indices": "attention to chosen tokens alone (sparse attention)",
    "block_indices": "attention to chosen tokens alone (sparse attention)",
    "cu_seq_lens_q": "attention within parts of the text (packed sequences)",
    "cu_seq_lens_k": "attention within parts of the text (packed sequences)",
    "encoder_hidden_states": "attention to another text (cross-attention)",
}
# What says nothing about the attention: what a step was called with, and what it is to return.
_HARMLESS = {
    "position_ids",  # of flash attention, which finds packed sequences by them; ours follow each other
    "cache_position",
    "position_embeddings",
    "past_key_values",
    "cache",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "logits_to_keep",
    "labels",
}


class DetachedError(UnsupportedModelError):
    """An attention that was not told which cache to attend over."""


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
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The registered attention function: batch 1, [1, H, T, D] in, [1, T, H, D] out."""
    if triforce is None:
        raise DetachedError(
            f"{type(module).__name__} was called without a cache of offload-triforce: either by a callback in the "
            "middle of a step, or by a model that does not hand keywords down to its attention"
        )
    _refuse(module, query, key, attention_mask, others)
    if s_aux is not None and s_aux.shape != query.shape[1:2]:
        raise UnsupportedModelError(
            f"{type(module).__name__} has learned attention sinks of shape {list(s_aux.shape)}; only one number for "
            f"each of its {query.shape[1]} query heads is supported"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    params = AttentionParams(scale, limiting_window(sliding_window, getattr(module, "config", None)), softcap, s_aux)
    output = triforce.attend(module.layer_idx, query[0], key[0], value[0], params)
    return output.transpose(0, 1)[None].contiguous(), None


def _refuse(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, others: dict[str, Any]) -> None:
    """Refuse by name whatever would make this attention another than the causal one of one text.

    Raises:
        UnsupportedModelError: what it is.
    """
    name, tokens = type(module).__name__, query.shape[2]
    if mask is not None:
        raise UnsupportedModelError(f"{name} brings an attention mask of its own, which is not supported")
    # The keyword counts, as it does for transformers' own functions; of a single token it says nothing.
    causal = others.pop("is_causal", None)
    if causal is None:
        causal = getattr(module, "is_causal", True)
    if not causal and tokens > 1:
        raise UnsupportedModelError(f"{name} attends to later tokens too (is_causal=False), which is not supported")
    dropout = others.pop("dropout", None)
    if dropout:
        raise UnsupportedModelError(
            f"{name} drops {dropout:.0%} of its attention at random; call the model's eval() before"
        )
    if query.shape[0] != 1:
        raise UnsupportedModelError(f"{name} reads {query.shape[0]} texts at a time, which is not supported")
    if key.shape[2] != tokens:
        raise UnsupportedModelError(f"{name} makes {key.shape[2]} keys of {tokens} tokens, which is not supported")
    for keyword, value in others.items():
        if value is None or value is False or keyword in _HARMLESS:
            continue
        if keyword not in _UNSUPPORTED:
            raise UnsupportedModelError(f"{name} calls its attention with {keyword!r}, whose meaning is not known here")
        raise UnsupportedModelError(f"{name} uses {_UNSUPPORTED[keyword]}, which is not supported")


AttentionInterface.register(ATTENTION_NAME, _attention)


def run(model: PreTrainedModel, tokens: Sequence[int], positions: Sequence[int], view: View, keep: int) -> Tensor:
    """One forward step of T ``tokens`` at their ``positions``, over ``view``: the last ``keep`` logits, [keep, V]."""
    both = to_device(torch.tensor([list(tokens), list(positions)], dtype=torch.long), model.device)
    return forward(model, both[0], both[1], view, keep, embed(model, tokens))


def forward(
    model: PreTrainedModel, ids: Tensor, positions: Tensor, view: View, keep: int, rows: Tensor | None = None
) -> Tensor:
    """The same with ids and positions (int64 [T]) that are on the device already.

    ``rows``: the tokens' embeddings [T, width], which are read in place of the ids.
    """
    inputs = {"input_ids": ids[None]} if rows is None else {"inputs_embeds": rows[None]}
    return model(**inputs, position_ids=positions[None], use_cache=False, logits_to_keep=keep, triforce=view).logits[
        0, -keep:
    ]
