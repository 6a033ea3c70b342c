"""Caches as a step with fixed operations sees them: what a CUDA graph can hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from offload_triforce.cache.buffer import GrowingBuffer
from offload_triforce.cache.recurrent import NodeView, PendingNodes
from offload_triforce.kernels import ops

# Takes what a step only reads into an attention, given the depths of its tokens and the counters.
Read = Callable[[ops.RunningAttention, Tensor, Sequence[Tensor]], None]


class Held(NamedTuple):
    """What a layer attends to: what it only reads, if there is any; then the buffer that its new tokens go to."""

    read: Read | None
    buffer: GrowingBuffer
    index: int


class StaticView:
    """Buffers under steps of T tokens that are the same work each time, on the same memory.

    ``GrowingBuffer.attend`` cuts out what is held, so its shapes change from step to step. Here every operation takes
    the whole buffer, and how much of it counts is a number on the device. The buffers themselves stay as they
    are: the host's ``length`` is still the truth, and steps of both kinds may take turns.
    """

    def __init__(
        self,
        buffers: Sequence[GrowingBuffer],
        find: Callable[[int, ops.AttentionParams], Held],
        tokens: int,
        sight: int,
        counters: Sequence[Callable[[], int]] = (),
        nodes: PendingNodes | None = None,
    ) -> None:
        """The memory that this allocates belongs to whoever captures the step.

        Args:
            buffers: those that a step writes to. find: what a layer of the model attends to, given its AttentionParams.
            tokens: T. sight: M, the newest tokens of a buffer that not every new one sees.
            counters: numbers of tokens that ``find``'s readers go by.
            nodes: what the steps of recurrent layers write to.
        """
        device = buffers[0].kv.device
        self.buffers, self.tokens, self.sight, self._find, self._counters = buffers, tokens, sight, find, counters
        self._back = torch.arange(-tokens, 0, device=device)
        self._attention = ops.RunningAttention()
        self._nodes = None if nodes is None else NodeView(nodes)
        self.hidden: Tensor | None = None  # of the newest step, [T, width], where the model tells: in one place

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """How many numbers ``held`` returns: two per buffer, one per counter, and one for recurrent layers."""
        return len(self.buffers), len(self.buffers), len(self._counters), int(self._nodes is not None)

    def held(self) -> list[int]:
        """What ``begin`` is to be told: tokens of each buffer once the step is written, those committed, counters.

        Raises:
            IndexError: they do not fit.
        """
        lengths = [buffer.length + self.tokens for buffer in self.buffers]
        for length, buffer in zip(lengths, self.buffers, strict=True):
            if length > buffer.capacity:
                raise IndexError(f"{length} tokens do not fit a buffer of {buffer.capacity}")
        committed, counts = [buffer.committed for buffer in self.buffers], [counter() for counter in self._counters]
        nodes = []
        if self._nodes is not None:
            self._nodes.nodes.check_room(self.tokens)
            nodes = [self._nodes.nodes.length + self.tokens]
        return [*lengths, *committed, *counts, *nodes]

    def begin(self, held: Tensor, mask: Tensor, depths: Tensor) -> None:
        """Start a step.

        Args:
            held: int64, what ``held()`` said, on the device.
            mask: bool [T, M], which of the newest M tokens of a buffer (its own last) each new one sees.
            depths: int64 [T], places behind the committed tokens.
        """
        lengths, committed, counts, nodes = held.split(self.sizes)
        self._mask, self._depths, self._counts = mask, depths, counts.split(1)
        self._ends = {
            buffer: (length, kept)
            for buffer, length, kept in zip(self.buffers, lengths.split(1), committed.split(1), strict=True)
        }
        if self._nodes is not None:
            self._nodes.begin(self._nodes.nodes.static_step(mask, self._back + nodes))

    def see(self, hidden: Tensor) -> None:
        """The hidden states [T, width] of the step's tokens."""
        if self.hidden is None:
            self.hidden = torch.empty_like(hidden)
        self.hidden.copy_(hidden)

    def convolve(self, convolution: ops.Convolution, _: object) -> Tensor:
        """The next recurrent layer's convolution of T new tokens: [T, C]."""
        return self._nodes.convolve(convolution)

    def recur(self, tokens: ops.DeltaTokens, _: object) -> Tensor:
        """That layer's delta rule: [T, Hv, Dv]."""
        return self._nodes.recur(tokens)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: ops.AttentionParams) -> Tensor:
        """Write T new tokens behind those held and attend from them to all they see: query [H, T, D] -> [H, T, D]."""
        read, buffer, index = self._find(layer, params)
        length, committed = self._ends[buffer]
        places, held = self._back + length, buffer.kv[index]
        held[0].index_copy_(1, places, key.to(held.dtype))
        held[1].index_copy_(1, places, value.to(held.dtype))
        self._attention.start(query, key.shape[0], params)
        if read is not None:
            read(self._attention, self._depths, self._counts)
        self._attention.update(held[0], held[1], ops.TreeMask(self._mask, self._depths + committed, length))
        return self._attention.finish()
