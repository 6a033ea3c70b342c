"""The output embedding in 8 bits: with a vocabulary of 250,000 words it is 2.5 GB in 16 bits, and each step reads it.

A word's weights are 8-bit codes with one float32 scale: the largest of them becomes 127. The hidden states keep their
dtype, so what a token's logits are depends on that token alone, and not on what else is in the same step. The model
that is loaded so *is* the model: all levels use this one head, so what comes out has this model's own distribution.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, modeling_utils

from offload_triforce.kernels import ops

MOST = 127
# Words that are packed at a time: what is computed on the way takes no more than some times that many rows.
ROWS = 1024


@contextmanager
def kept_in_host_memory(
    model: PreTrainedModel, device: torch.device, kept: Collection[nn.Module]
) -> Iterator[dict[str, torch.device]]:
    """Where ``from_pretrained`` has to put weights, so that the ``kept`` parts never lie on ``device`` as a whole.

    transformers takes two devices as a wish for weights that come and go, and would hang accelerate's hooks on every
    module; while this lasts, it does not. ``model``: the same, without weights.
    """
    host = torch.device("cpu")
    names = [name for name, part in model.named_modules() if any(part is other for other in kept)]
    before = getattr(modeling_utils, "accelerate_dispatch", None)
    if device == host or before is None or not names:
        yield {"": device}
        return
    modeling_utils.accelerate_dispatch = lambda *_, **__: None
    try:
        yield {"": device, **dict.fromkeys(names, host)}
    finally:
        modeling_utils.accelerate_dispatch = before


class Int8Head(nn.Module):
    """A linear layer whose weights are int8 codes [words, hidden] with a float32 scale [words].

    ``weight``: the codes. ``bias``: of the model's dtype, or None.
    """

    def __init__(self, codes: Tensor, scale: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = codes.shape
        self.weight, self.scale = (nn.Parameter(part, requires_grad=False) for part in (codes, scale))
        self.bias = bias

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [..., words] of hidden states [..., hidden], in their dtype."""
        flat = hidden.reshape(-1, self.in_features)
        logits = ops.int8_product(flat, self.weight, self.scale).view(*hidden.shape[:-1], self.out_features)
        return logits if self.bias is None else logits + self.bias


@torch.no_grad()
def pack_head(model: PreTrainedModel, device: torch.device) -> None:
    """Replace a model's output embedding by its packed form on ``device``, wherever it lies; its weights are given up.

    It must not be tied to the input embedding.
    """
    head = model.get_output_embeddings()
    codes = torch.empty(head.weight.shape, dtype=torch.int8, device=device)
    scale = torch.empty(head.weight.shape[0], dtype=torch.float32, device=device)
    for start in range(0, len(scale), ROWS):
        part = head.weight.data[start : start + ROWS].to(device).float()
        largest = part.abs().amax(dim=1)
        scale[start : start + ROWS] = torch.where(largest > 0, largest / MOST, 1.0)
        codes[start : start + ROWS] = (
            (part / scale[start : start + ROWS, None]).round().clamp(-MOST, MOST).to(torch.int8)
        )
    bias = None if head.bias is None else nn.Parameter(head.bias.data.to(device), requires_grad=False)
    model.set_output_embeddings(Int8Head(codes, scale, bias).eval())
