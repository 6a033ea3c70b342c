"""Packed weights: what they take."""

from __future__ import annotations

import torch


def compute_in_their_dtype(monkeypatch):
    """bitsandbytes' 4-bit products on some processors round their inputs to bfloat16, whatever they are: a difference
    in the last bit of a float32 grows by 2^16 there. Where tokens are compared, they must not.
    """
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


def bytes_taken(model):
    """Of all weights, and of all tensors that packed ones need to be unpacked again."""
    taken = 0
    for weight in model.parameters():
        scale = getattr(weight, "SCB", None)
        taken += weight.nbytes + (0 if scale is None else scale.nbytes) + _taken(getattr(weight, "quant_state", None))
    return taken


def _taken(state):
    """Of bitsandbytes' state of a weight: scales, those of the scales, and tables."""
    if state is None:
        return 0
    tensors = [value for value in vars(state).values() if isinstance(value, torch.Tensor)]
    return sum(tensor.nbytes for tensor in tensors) + _taken(state.state2)
