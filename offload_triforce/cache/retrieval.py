"""The retrieval cache: of a long context, the few thousand tokens per KV head that the queries want now."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offload_triforce.cache.buffer import GrowingBuffer
from offload_triforce.errors import InputError
from offload_triforce.kernels import ops


@dataclass(frozen=True)
class RetrievalShape:
    """How a budget is spent, in tokens: sink chunks, chosen chunks, recent window. Validated on construction."""

    budget: int
    chunk: int
    sink: int
    recent: int

    def __post_init__(self) -> None:
        if self.sink % self.chunk:
            raise InputError(f"sink must be a multiple of the chunk of {self.chunk} tokens, not {self.sink}")
        if self.slots < 1:
            least = self.sink + self.recent + self.chunk
            raise InputError(
                f"budget {self.budget} leaves no room for a single chunk: sink {self.sink}, recent window "
                f"{self.recent} and one chunk of {self.chunk} need at least {least} tokens"
            )

    @property
    def slots(self) -> int:
        """Chunks to choose per KV head and layer."""
        return (self.budget - self.sink - self.recent) // self.chunk

    def recent_start(self, length: int) -> int:
        """Where the recent window of ``length`` tokens begins: at a chunk, or at 0 while there is no pool yet."""
        start = max(0, length - self.recent) // self.chunk * self.chunk
        return start if start > self.sink else 0

    def tail_needed(self, block: int) -> int:
        """Newest tokens that a full cache must have on the device, for ``sync`` to find the recent window there."""
        return self.recent + self.chunk + block

    def capacity(self, block: int) -> int:
        """Tokens to make room for, per KV head and layer; ``block`` as for the cache."""
        return self.sink + self.slots * self.chunk + self.recent + self.chunk + 2 * block

    def pool(self, length: int) -> range:
        """Chunk numbers to choose from: all between the sink and the recent window."""
        first = self.sink // self.chunk
        return range(first, max(first, self.recent_start(length) // self.chunk))


class RetrievalCache(GrowingBuffer):
    """Sink chunk | chosen chunks | recent window | tokens being drafted, per layer and KV head, on the device.

    The choice is *refreshed* whenever a pass streams the full cache by (``refresh``): held chunks are
    scored again, chunks on their way through the device are scored and the winners kept as they pass, so it
    costs no link bytes. Keys keep the rotary position they were computed at.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        shape: RetrievalShape,
        block: int,
        dtype: torch.dtype,
        device: torch.device,
        context: int,
    ) -> None:
        """``block``: most tokens that one pass commits, and most pending at once. ``context``: longest text."""
        self.shape = shape
        super().__init__(layers, kv_heads, shape.capacity(block), head_dim, dtype, device)
        # Chunk numbers per layer, KV head and slot; -1 is an empty slot.
        self.chosen = torch.full((layers, kv_heads, shape.slots), -1, dtype=torch.long, device=device)
        # The same as a set: whether a chunk is chosen. One column more than chunks, see ``ops.Choice``.
        self.held = torch.zeros(layers, kv_heads, context // shape.chunk + 1, dtype=torch.bool, device=device)
        self.filled = 0  # slots in use: the same number for every layer and head, from the first on

    def refresh(self, layer: int, packed: Tensor, baseline: Tensor, scaling: float, length: int) -> Refresh:
        """Begin to choose anew for one layer, at ``length`` committed tokens.

        ``baseline`` [K, G*T] is the log-sum-exp of the packed queries [K, G*T, D] over the tail. Show the result every
        token in order.
        """
        return Refresh(self, layer, packed, baseline, scaling, length)

    def sync(self, tail: Tensor, start: int, length: int, refreshed: int) -> None:
        """Take the recent window from the full cache's tail, after a refresh of all layers.

        Args:
            tail: [layers, 2, K, n, D], the tokens from position ``start`` on.
            start: position of the tail's first token.
            length: committed tokens of the full cache.
            refreshed: committed tokens at the time of the refresh.
        """
        shape = self.shape
        begin = shape.recent_start(refreshed)
        self.filled = min(len(shape.pool(refreshed)), shape.slots)
        base = shape.sink + self.filled * shape.chunk if begin else 0
        self.length, self.pending = base + length - begin, 0
        self.kv[:, :, :, base : self.length] = tail[:, :, :, begin - start : length - start]

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.chosen.fill_(-1)
        self.held.fill_(False)
        self.filled = 0


class Refresh:
    """A new choice in the making, for one layer: sees the context go by once and keeps the best chunks."""

    def __init__(
        self, cache: RetrievalCache, layer: int, packed: Tensor, baseline: Tensor, scaling: float, length: int
    ) -> None:
        shape, kv = cache.shape, cache.kv[layer]
        self.shape, self.packed, self.scaling = shape, packed, scaling
        self.pool = shape.pool(length)
        self.sink = kv[:, :, : shape.sink]
        chosen = kv[:, :, shape.sink : shape.sink + shape.slots * shape.chunk]
        self.slots = chosen.unflatten(2, (shape.slots, shape.chunk))  # a view: writing here fills the cache
        if cache.filled and shape.sink:  # the sink is in, since chunks have been chosen before
            wishes = torch.matmul(packed.float(), self.sink[0].float().transpose(1, 2)) * scaling
            baseline = torch.logaddexp(baseline, wishes.logsumexp(dim=-1))
        self.baseline = baseline
        scores = torch.full(cache.chosen[layer].shape, float("-inf"), device=kv.device)
        if cache.filled:
            keys = kv[0, :, shape.sink : shape.sink + cache.filled * shape.chunk]
            scores[:, : cache.filled] = ops.chunk_scores(packed, keys, shape.chunk, scaling, baseline)
        self.choice = ops.Choice(scores, cache.chosen[layer], cache.held[layer])

    def see(self, start: int, kv: Tensor) -> None:
        """Consider the chunks of the tokens from position ``start`` on; ``kv`` is [2, K, n, D]."""
        chunk, sink = self.shape.chunk, self.shape.sink
        first = max(start // chunk, self.pool.start)
        last = min((start + kv.shape[2]) // chunk, self.pool.stop)
        if start == 0 and len(self.pool):
            self.sink.copy_(kv[:, :, :sink])
        if first >= last:
            return
        part = kv[:, :, first * chunk - start : last * chunk - start]
        held = self.choice.held[:, first:last]
        offered = ops.chunk_scores(self.packed, part[0], chunk, self.scaling, self.baseline, held)
        ops.gather_chunks(ops.select_chunks(self.choice, offered, first), part, self.slots)
