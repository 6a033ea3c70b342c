"""The retrieval cache: of a long context, the few thousand tokens per KV head that the queries want now."""

from __future__ import annotations

import torch
from torch import Tensor

from offload_triforce.cache.buffer import GrowingBuffer, TreeStep
from offload_triforce.cache.chunks import make_store
from offload_triforce.cache.layer import Snapshot
from offload_triforce.cache.sizes import RetrievalShape
from offload_triforce.kernels import ops

# Tokens of a prompt that are scored at a time, in float32: about so many.
FILL_PART = 1024


class RetrievalCache(GrowingBuffer):
    """What the retrieval level attends to, per layer and KV head, on the device: chosen chunks in a store, and in
    the buffer: sink chunk | recent window | tokens being drafted.

    The choice is *refreshed* whenever a pass streams the full cache by (``refresh``): held chunks are
    scored again, chunks on their way through the device are scored and the winners kept as they pass, so it
    costs no link bytes. Keys keep the rotary position they were computed at. Drafting may go on meanwhile: until
    ``sync``, it sees the slots that were filled before, whatever has moved into them.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        shape: RetrievalShape,
        news: int,
        drafts: int,
        dtype: torch.dtype,
        device: torch.device,
        context: int,
    ) -> None:
        """``news``: most tokens that one pass commits. ``drafts``: most pending. ``context``: longest text."""
        self.shape, self.most_pending = shape, drafts
        super().__init__(layers, kv_heads, shape.near(news, drafts), head_dim, dtype, device)
        self.store = make_store(layers, kv_heads, shape.slots, shape.chunk, head_dim, shape.bits, dtype, device)
        # Chunk numbers per layer, KV head and slot; -1 is an empty slot. And how much they were wanted.
        self.chosen = torch.full((layers, kv_heads, shape.slots), -1, dtype=torch.long, device=device)
        self.scores = torch.full(self.chosen.shape, float("-inf"), device=device)
        # The same as a set: whether a chunk is chosen. One column more than chunks, see ``ops.ChunkSelection``.
        self.held = torch.zeros(layers, kv_heads, context // shape.chunk + 1, dtype=torch.bool, device=device)
        self.choice = ops.RunningChoice()
        self.pool = range(0)  # chunks that the choice has been made from
        self.filled = 0  # slots in use: the same number for every layer and head, from the first on

    def attend_draft(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        params: ops.AttentionParams,
        step: TreeStep | None = None,
    ) -> Tensor:
        """The retrieval level's step: its T new tokens become pending, and see all that is held."""
        self._attention.start(query, key.shape[0], params)
        if self.filled:
            self.store.attend_on(self._attention, layer, self.filled)
        self.attend_on(self._attention, layer, key, value, params, step)
        return self._attention.finish()

    def fill(self, layer: int, kv: Tensor, queries: Tensor, params: ops.AttentionParams) -> None:
        """See ``FilledLayers``: the first choice, made by the newest queries of the prompt.

        The sink and the recent window come with ``sync``.
        """
        self.store.calibrate(layer, kv[0])
        length, tokens = kv.shape[2], queries.shape[1]
        recent, sink = max(self.shape.recent, tokens), self.shape.sink
        near, attention = kv[:, :, -recent:], ops.RunningAttention()
        attention.start(queries, kv.shape[1], params)
        attention.update(near[0], near[1], ops.own_tokens(tokens, kv.device))
        if 0 < sink <= length - recent:
            attention.update(kv[0, :, :sink], kv[1, :, :sink])
        refresh = self.refresh(layer, attention.packed, attention.logsumexp(), params.scaling, length)
        part = max(1, FILL_PART // self.shape.chunk) * self.shape.chunk
        for start in range(0, length, part):
            refresh.see(start, kv[:, :, start : start + part])

    def end_fill(self, tokens: int) -> None:
        """See ``FilledLayers``. Nothing to do: ``sync`` follows."""

    def refresh(
        self, layer: int, packed: Tensor, baseline: Tensor, scaling: float, length: int, anew: bool = True
    ) -> Refresh:
        """Begin to choose for one layer, at ``length`` committed tokens.

        ``baseline`` [K, G*T] is the log-sum-exp of the packed queries [K, G*T, D] over the tail. Show the result every
        token in order. Without ``anew`` the choice stays, but for chunks that have left the recent window since: they
        take the place of those that were wanted least.
        """
        return Refresh(self, layer, packed, baseline, scaling, length, anew)

    def sync(self, tail: Tensor, start: int, length: int, refreshed: int) -> None:
        """Take the recent window from the full cache's tail, after a refresh of all layers. Drafts stay behind it.

        Args:
            tail: [layers, 2, K, n, D], the tokens from position ``start`` on.
            start: position of the tail's first token.
            length: committed tokens of the full cache.
            refreshed: committed tokens at the time of the refresh.
        """
        shape = self.shape
        begin = shape.recent_start(refreshed)
        self.pool = shape.pool(refreshed)
        self.filled = min(len(self.pool), shape.slots)
        base = shape.sink if begin else 0
        recent = base + length - begin
        drafts = self.kv[:, :, :, self.committed : self.length]
        self.kv[:, :, :, recent : recent + self.pending] = drafts.clone() if self.pending else drafts
        self.length = recent + self.pending
        self.kv[:, :, :, base:recent] = tail[:, :, :, begin - start : length - start]

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.chosen.fill_(-1)
        self.held.fill_(False)
        self.pool, self.filled = range(0), 0

    def snapshot(self) -> dict[str, Tensor]:
        """See ``CacheLayers``: also which chunks are chosen, and their keys and values. Between two passes."""
        parts = {name: part.to("cpu", copy=True) for name, part in self._parts().items()}
        numbers = torch.tensor([self.pool.start, self.pool.stop, self.filled])
        return {**super().snapshot(), "pool and filled": numbers, **parts}

    def restore(self, snapshot: Snapshot) -> None:
        """See ``CacheLayers``."""
        super().restore(snapshot)
        for name, part in self._parts().items():
            part.copy_(snapshot[name])
        start, stop, self.filled = snapshot["pool and filled"].tolist()
        self.pool = range(start, stop)

    def _parts(self) -> dict[str, Tensor]:
        """The memory that the choice is in."""
        return {"chosen": self.chosen, "scores": self.scores, "held": self.held, **self.store.parts()}


# Score of a chunk that has left the recent window, where the choice stays: above all that were chosen, and higher the
# newer it is, so that of many the newest stay. float32 tells this many of them apart.
ALWAYS, MOST_CHUNKS = 1e30, 2**20


class Refresh:
    """A new choice in the making, for one layer: sees the context go by once and keeps the best chunks."""

    def __init__(
        self,
        cache: RetrievalCache,
        layer: int,
        packed: Tensor,
        baseline: Tensor,
        scaling: float,
        length: int,
        anew: bool,
    ) -> None:
        shape = self.shape = cache.shape
        self.anew = anew
        self.pool = shape.pool(length)
        self.sink = cache.kv[layer, :, :, : shape.sink]
        scores = cache.scores[layer]
        if anew:
            if cache.filled and shape.sink:  # the sink is in, since chunks have been chosen before
                wishes = torch.matmul(packed.float(), self.sink[0].float().transpose(1, 2)) * scaling
                baseline = torch.logaddexp(baseline, wishes.logsumexp(dim=-1))
            scores.fill_(float("-inf"))
            if cache.filled:
                keys = cache.store.keys(layer, cache.filled)
                scores[:, : cache.filled] = ops.chunk_scores(packed, keys, shape.chunk, scaling, baseline)
        else:
            self.pool = range(max(self.pool.start, cache.pool.stop), self.pool.stop)
        self.selection = ops.ChunkSelection(scores, cache.chosen[layer], cache.held[layer])
        self.choice, self.slots = cache.choice, cache.store.slots(layer)
        self.choice.start(packed, baseline, scaling, shape.chunk, self.selection, self.slots)

    def see(self, start: int, kv: Tensor) -> None:
        """Consider the chunks of the tokens from position ``start`` on; ``kv`` is [2, K, n, D]."""
        chunk, tokens = self.shape.chunk, kv.shape[2]
        first = max(start // chunk, self.pool.start)
        last = min((start + tokens) // chunk, self.pool.stop)
        if start == 0 and len(self.pool):
            self.sink.copy_(kv[:, :, : self.shape.sink])
        if first >= last:
            return
        whole = (last - first) * chunk == tokens
        part = kv if whole else kv[:, :, first * chunk - start : last * chunk - start]
        if self.anew:
            self.choice.see(first, part)
            return
        newer = torch.arange(first, last, device=part.device) / MOST_CHUNKS
        offered = (ALWAYS * (1 + newer)).float().expand(part.shape[1], -1).contiguous()
        ops.take_chunks(self.selection, offered, first, part, self.slots)
