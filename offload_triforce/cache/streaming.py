"""The draft model's cache: sink tokens and a recent window, at contiguous positions."""

from __future__ import annotations

import torch

from offload_triforce.cache.buffer import GrowingBuffer
from offload_triforce.errors import InputError


class StreamingCache(GrowingBuffer):
    """Sink + recent tokens of a text that may be far longer, after StreamingLLM (arXiv 2309.17453).

    As there, positions are those *inside the cache*: the window follows the sink without a gap, however much
    text was skipped between them. StreamingLLM turns every cached key at every step to keep it so. Here tokens
    append at growing positions until the cache is full; then its owner reads the sink and the newest ``keep``
    tokens afresh in one forward pass (``refill``). That holds for any position scheme and never reads the middle
    of a long prompt; benchmarks/streaming_positions.py compares the acceptance of both ways.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        capacity: int,
        sink: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """``capacity``: tokens held at most, of which ``sink`` from the start of the text."""
        self.sink = sink
        self.keep = capacity - max(1, capacity // 4)
        if self.keep <= sink:
            raise InputError(
                f"a draft cache of {capacity} tokens leaves no room for a recent window beside {sink} sink tokens; "
                f"it takes at least {2 * sink + 2}"
            )
        self.skipped = 0
        super().__init__(layers, kv_heads, capacity, head_dim, dtype, device)

    @property
    def text(self) -> int:
        """Tokens of the text that have been read or skipped."""
        return self.skipped + self.length

    def refill(self, length: int) -> list[range]:
        """Start over for a text of ``length`` tokens: returns which of them must be read now, in order."""
        self.length = self.pending = 0
        if length <= self.keep:
            ranges = [range(length)]
        else:
            ranges = [range(self.sink), range(length - self.keep + self.sink, length)]
        self.skipped = length - sum(len(r) for r in ranges)
        return ranges

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.skipped = 0
