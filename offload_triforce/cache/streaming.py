"""The draft model's cache: sink tokens and a recent window, at contiguous positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from offload_triforce.cache.buffer import GrowingBuffer
from offload_triforce.cache.layer import Snapshot
from offload_triforce.cache.recurrent import RecurrentCache
from offload_triforce.errors import InputError

# (keys [layers, K, n, D], e) -> the same keys, e positions earlier.
Turn = Callable[[Tensor, int], Tensor]


class StreamingCache(GrowingBuffer):
    """Sink + recent tokens of a text that may be far longer, after StreamingLLM (arXiv 2309.17453).

    Positions are those inside the cache: the window follows the sink without a gap, however much text was left
    out between them, and moves up when its oldest tokens go. A long text is not read from its beginning but
    from where the window begins, which costs no acceptance (benchmarks/streaming_positions.py).
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        capacity: int,
        sink: int,
        turn: Turn,
        dtype: torch.dtype,
        device: torch.device,
        recurrent: RecurrentCache | None = None,
    ) -> None:
        """``capacity``: tokens held at most, of which ``sink`` from the start of the text. ``turn`` moves keys.

        ``recurrent``: of the model's recurrent layers. Their state is of all that has been read, sink and window.
        """
        # Tokens that go at once: moving the window is work, and rounds the keys.
        self.step = max(1, capacity // 8)
        if capacity - sink < 2 * self.step:
            raise InputError(
                f"a draft cache of {capacity} tokens leaves no room for a recent window beside {sink} sink tokens; "
                f"use at least {2 * sink + 2}"
            )
        self.sink, self._turn, self.recurrent = sink, turn, recurrent
        self.skipped = 0
        super().__init__(layers, kv_heads, capacity, head_dim, dtype, device)

    @property
    def text(self) -> int:
        """Tokens of the text that have been read or left out."""
        return self.skipped + self.length

    def begin(self, length: int) -> list[range]:
        """Start on a text of ``length`` tokens: returns which of them must be read, in order."""
        self.reset()
        held = self.capacity - self.step
        if length <= held:
            return [range(length)]
        self.skipped = length - held
        return [range(self.sink), range(length - held + self.sink, length)]

    def make_room(self, tokens: int) -> None:
        """Let the oldest settled tokens of the window go, until ``tokens`` more fit.

        Raises:
            IndexError: too many tokens are pending for that.
        """
        missing = self.length + tokens - self.capacity
        if missing <= 0:
            return
        gone = max(missing, min(self.step, self.committed - self.sink))
        if gone > self.committed - self.sink:
            raise IndexError(f"{tokens} tokens do not fit beside {self.pending} pending ones")
        stay = self.kv[:, :, :, self.sink + gone : self.length].clone()  # the ranges overlap
        stay[:, 0] = self._turn(stay[:, 0], gone)
        self.length -= gone
        self.skipped += gone
        self.kv[:, :, :, self.sink : self.length] = stay

    def end_step(self, tokens: int) -> None:
        """The step is through all layers: its tokens are held, and pending."""
        super().end_step(tokens)
        if self.recurrent is not None:
            self.recurrent.end_step(tokens)

    def select(self, kept: Sequence[int]) -> None:
        """Keep these of the pending tokens (their numbers, ascending), moved together, and drop the others."""
        super().select(kept)
        if self.recurrent is not None:
            self.recurrent.select(kept)

    def settle(self, tokens: int) -> None:
        """Accept the first ``tokens`` pending tokens; the others stay pending."""
        super().settle(tokens)
        if self.recurrent is not None:
            self.recurrent.settle(tokens)

    def commit(self, tokens: int) -> None:
        """Accept the first ``tokens`` pending tokens and drop the others."""
        super().commit(tokens)
        if self.recurrent is not None:
            self.recurrent.commit(0)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.skipped = 0
        if self.recurrent is not None:
            self.recurrent.reset()

    def snapshot(self) -> dict[str, Tensor]:
        """See ``CacheLayers``."""
        own = {} if self.recurrent is None else self.recurrent.snapshot()
        return {**super().snapshot(), "skipped": torch.tensor([self.skipped]), **own}

    def restore(self, snapshot: Snapshot) -> None:
        """See ``CacheLayers``."""
        super().restore(snapshot)
        self.skipped = int(snapshot["skipped"])
        if self.recurrent is not None:
            self.recurrent.restore(snapshot)
