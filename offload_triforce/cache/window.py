"""The cache of sliding-window layers: they never look further back than the window, so nothing is offloaded."""

from __future__ import annotations

import torch
from torch import Tensor

from offload_triforce.cache.buffer import GrowingBuffer, TreeStep
from offload_triforce.cache.layer import Snapshot
from offload_triforce.cache.sizes import window_room
from offload_triforce.kernels import ops


class WindowCache(GrowingBuffer):
    """The newest tokens of the layers with a sliding window, on the device. Exact for every level.

    What is committed always comes from the target. The retrieval level reads it too, and keeps its own draft tokens
    apart, in ``drafts``: it may go on drafting while a pass of the target is under way.
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
        drafts: int = 0,
    ) -> None:
        """``windows``: one size per layer. ``context``: longest text.

        ``block``: most tokens pending at once. ``drafts``: the same of the retrieval level.
        """
        self.windows = windows
        self.reach = max(windows)
        self.block = block
        super().__init__(len(windows), kv_heads, window_room(windows, context, block), head_dim, dtype, device)
        self.drafts = GrowingBuffer(len(windows), kv_heads, drafts, head_dim, dtype, device)

    def attend_draft(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        params: ops.AttentionParams,
        step: TreeStep | None = None,
    ) -> Tensor:
        """The retrieval level's step: its T new tokens become drafts, and see those and what is committed."""
        attention = self._attention
        attention.start(query, key.shape[0], params)
        first = max(0, self.committed - params.window + 1)
        if self.committed:
            held = self.kv[layer, :, :, first : self.committed]
            tokens, device = query.shape[1], query.device
            depths = step.depths if step else torch.arange(tokens, device=device) + self.drafts.length
            seen = torch.ones(tokens, 1, dtype=torch.bool, device=device)
            attention.update(held[0], held[1], ops.TreeMask(seen, depths + held.shape[2]))
        self.drafts.attend_on(attention, layer, key, value, params, step)
        return attention.finish()

    def attend_static(self, attention: ops.RunningAttention, layer: int, depths: Tensor, tokens: Tensor) -> None:
        """Take what is committed into an attention in a step of fixed work.

        ``depths`` int64 [T], the queries' places behind it. ``tokens`` int64 [1]: how much is committed.
        """
        seen = torch.ones(len(depths), 1, dtype=torch.bool, device=depths.device)
        attention.update(self.kv[layer, 0], self.kv[layer, 1], ops.TreeMask(seen, depths + tokens, tokens))

    def commit(self, tokens: int) -> None:
        """Accept the first ``tokens`` pending tokens, drop the others, and forget what no window reaches."""
        super().commit(tokens)
        if self.capacity - self.length < self.block:
            self.drop_front(max(0, self.length - self.reach))

    def fill(self, layer: int, kv: Tensor, queries: Tensor, params: ops.AttentionParams) -> None:
        """See ``FilledLayers``. Only the newest tokens are kept; ``kv`` may begin with what ``load`` has given."""
        self.replace(layer, kv[:, :, -self.reach :])

    def load(self, layer: int, kv: Tensor) -> None:
        """One layer's newest committed tokens, into ``kv`` [2, K, at most reach, D]."""
        kv.copy_(self.kv[layer, :, :, self.committed - kv.shape[2] : self.committed])

    def filled(self, layer: int, start: int, stop: int) -> Tensor:
        """Of a layer that ``fill`` has given all ``stop`` tokens, a copy of those from ``start`` on that it keeps."""
        held = min(stop, self.reach)
        return self.kv[layer, :, :, max(0, held - (stop - start)) : held].to("cpu", copy=True)

    def end_fill(self, tokens: int) -> None:
        """All layers have been filled with ``tokens`` tokens."""
        self.length = min(tokens, self.reach)

    def can_drop(self, newest: int, text: int) -> bool:
        """Whether the window is still whole without the ``newest`` of ``text`` committed tokens."""
        return newest <= self.committed and self.committed - newest >= min(text - newest, self.reach)

    def drop(self, newest: int) -> None:
        """Forget the ``newest`` committed tokens, see ``can_drop``, and all that is pending or drafted.

        Raises:
            IndexError: there are not so many.
        """
        super().commit(0)
        if not 0 <= newest <= self.committed:
            raise IndexError(f"cannot drop {newest} of {self.committed} tokens")
        self.length -= newest
        self.drafts.reset()

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.drafts.reset()

    def snapshot(self) -> dict[str, Tensor]:
        """See ``CacheLayers``: what any window reaches."""
        return {"kv": self.settled[:, :, :, -self.reach :].to("cpu", copy=True)}

    def restore(self, snapshot: Snapshot) -> None:
        """See ``CacheLayers``. What is drafted follows another text, and goes."""
        super().restore(snapshot)
        self.drafts.reset()
