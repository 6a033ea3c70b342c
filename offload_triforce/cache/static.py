"""Caches as a step with fixed operations sees them: what a CUDA graph can hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from offload_triforce.cache.buffer import GrowingBuffer
from offload_triforce.kernels import ops

# (layer of the model, its rule) -> the buffer that it attends to, and the layer's number in there.
Find = Callable[[int, ops.Rule], tuple[GrowingBuffer, int]]


class StaticView:
    """Growing buffers under steps of T tokens that are the same work each time, on the same memory.

    ``GrowingBuffer.attend`` cuts out what is held, so its shapes change from step to step. Here every operation takes
    the whole buffer, and how much of it counts is a number on the device. The buffers themselves stay as they
    are: the host's ``length`` is still the truth, and steps of both kinds may take turns.
    """

    def __init__(self, buffers: Sequence[GrowingBuffer], find: Find, tokens: int) -> None:
        """``tokens``: T. The memory that this allocates belongs to whoever captures the step."""
        device = buffers[0].kv.device
        self.buffers, self.tokens, self._find = tuple(buffers), tokens, find
        self._back = torch.arange(-tokens, 0, device=device)
        self._mask = ops.causal_mask(tokens, tokens, device=device)
        self._attention = ops.RunningAttention()
        self._ends: dict[GrowingBuffer, tuple[Tensor, ops.Newest]] = {}

    def held(self) -> list[int]:
        """Tokens that each buffer holds once the step is written.

        Raises:
            IndexError: they do not fit.
        """
        lengths = [buffer.length + self.tokens for buffer in self.buffers]
        for length, buffer in zip(lengths, self.buffers, strict=True):
            if length > buffer.capacity:
                raise IndexError(f"{length} tokens do not fit a buffer of {buffer.capacity}")
        return lengths

    def begin(self, held: Tensor) -> None:
        """Start a step. ``held``, int64 [buffers], is what ``held()`` said, on the device."""
        for buffer, length in zip(self.buffers, held.split(1), strict=True):
            self._ends[buffer] = self._back + length, ops.Newest(self._mask, length=length)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: ops.Rule) -> Tensor:
        """Write T new tokens behind those held and attend from them to all: query [H, T, D] -> [H, T, D]."""
        buffer, index = self._find(layer, rule)
        places, newest = self._ends[buffer]
        held = buffer.kv[index]
        held[0].index_copy_(1, places, key.to(held.dtype))
        held[1].index_copy_(1, places, value.to(held.dtype))
        self._attention.start(query, key.shape[0], rule)
        self._attention.update(held[0], held[1], newest)
        return self._attention.finish()
