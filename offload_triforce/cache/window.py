"""The cache of sliding-window layers: they never look further back than the window, so nothing is offloaded."""

from __future__ import annotations

import torch
from torch import Tensor

from offload_triforce.cache.buffer import GrowingBuffer


class WindowCache(GrowingBuffer):
    """The newest tokens of the layers with a sliding window, on the device. Exact for every level.

    Both the retrieval level and the target append here; the former's tokens are rolled back before the latter's
    pass, so that what is committed always comes from the target.
    """

    def __init__(
        self,
        windows: list[int],
        kv_heads: int,
        head_dim: int,
        context: int,
        block: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """``windows``: one size per layer. ``context``: longest text. ``block``: most tokens pending at once."""
        self.windows = windows
        self.reach = max(windows)
        self.block = block
        super().__init__(len(windows), kv_heads, self.room_for(windows, context, block), head_dim, dtype, device)

    @staticmethod
    def room_for(windows: list[int], context: int, block: int) -> int:
        """Tokens to make room for, per layer."""
        held = min(max(windows), context)
        return held + max(held // 4, block) + block  # a quarter more, so that moving to the front is rare

    def commit(self, tokens: int) -> None:
        """Accept the first ``tokens`` pending tokens, drop the others, and forget what no window reaches."""
        super().commit(tokens)
        if self.capacity - self.length < self.block:
            self.drop_front(max(0, self.length - self.reach))

    def fill_layer(self, layer: int, kv: Tensor) -> None:
        """Prefill: all tokens of one layer, ``kv`` [2, K, n, D]; only the newest are kept."""
        self.write(layer, kv[0, :, -self.reach :], kv[1, :, -self.reach :])

    def end_fill(self, tokens: int) -> None:
        """All layers have been filled with ``tokens`` tokens."""
        self.length += min(tokens, self.reach)
