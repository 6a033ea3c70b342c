"""The full KV cache: tiles in host memory (or resident on the device), and a tail of the newest tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

from offload_triforce.cache.buffer import GrowingBuffer
from offload_triforce.kernels import reference as ops
from offload_triforce.scheduler.pipeline import TileStream
from offload_triforce.scheduler.plan import TilePlan


class TileObserver(Protocol):
    """Somebody who looks at the keys and values that a pass attends, in order, while they are on the device."""

    def see(self, start: int, key: Tensor, value: Tensor) -> None:
        """Tokens from position ``start`` on, [K, n, D] each."""


Observe = Callable[[Tensor, ops.PartialAttention, float], TileObserver]


class FullCache:
    """Every token's KV for the layers that attend to everything. Append-only, with explicit commit and rollback.

    Tokens [0, tiled) are whole tiles, held by the ``stream``'s store; tokens [tiled, length) are the tail, on the
    device, followed by pending tokens of a pass that has not been judged yet. Pending tokens never leave the device.
    """

    def __init__(self, stream: TileStream, keep: int, block: int, dtype: torch.dtype, device: torch.device) -> None:
        """``keep``: newest tokens that stay on the device. ``block``: most tokens pending at once."""
        plan = stream.plan
        self.stream = stream
        self.keep = keep
        self.tail = GrowingBuffer(
            plan.layers, plan.kv_heads, self.tail_capacity(plan, keep, block), plan.head_dim, dtype, device
        )
        self.tiles = 0

    @staticmethod
    def tail_capacity(plan: TilePlan, keep: int, block: int) -> int:
        """Tokens that the tail makes room for, per layer."""
        return plan.tile_tokens + keep + block

    @property
    def tiled(self) -> int:
        """Tokens that lie in whole tiles."""
        return self.tiles * self.stream.plan.tile_tokens

    @property
    def length(self) -> int:
        """Committed tokens."""
        return self.tiled + self.tail.committed

    @property
    def pending(self) -> int:
        """Tokens that wait for a verdict."""
        return self.tail.pending

    def begin_step(self) -> None:
        """Start a forward step over everything held: its tiles begin to stream."""
        self.stream.begin(self.tiles)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        observe: Observe | None = None,
    ) -> Tensor:
        """Attention of the step's T new tokens over all that is held: query [H, T, D] -> [H, T, D].

        The new tokens' ``key`` and ``value`` [K, T, D] become pending. ``observe``, called with the packed
        queries and their attention over the tail, may return an observer of the tokens that pass by.
        """
        tokens = query.shape[1]
        packed = ops.pack_queries(query, key.shape[0])
        tail = self.tail.write(layer, key, value)
        mask = ops.causal_mask(tokens, tail.shape[2], device=query.device)
        state = ops.attention_update(ops.attention_start(packed), packed, tail[0], tail[1], scaling, mask)
        observer = observe(packed, state, scaling) if observe else None
        for tile in self.stream.tiles(layer):
            state = ops.attention_update(state, packed, tile.kv[0], tile.kv[1], scaling)
            if observer:
                observer.see(tile.index * self.stream.plan.tile_tokens, tile.kv[0], tile.kv[1])
        if observer:
            observer.see(self.tiled, tail[0, :, : self.tail.committed], tail[1, :, : self.tail.committed])
        return ops.attention_finish(state, query.shape[0], query.dtype)

    def end_step(self, tokens: int) -> None:
        """The step is through all layers: its tokens are pending."""
        self.tail.end_step(tokens)

    def keep_pending(self, tokens: int) -> None:
        """Drop all but the first ``tokens`` pending tokens; those stay pending."""
        self.tail.keep_pending(tokens)

    def commit(self, tokens: int) -> None:
        """Accept the first ``tokens`` pending tokens, drop the others, and move whole tiles out of the tail."""
        self.tail.commit(tokens)
        tile = self.stream.plan.tile_tokens
        while self.tail.length >= tile + self.keep:
            for layer in range(self.stream.plan.layers):
                self.stream.store.write(layer, self.tiles, self.tail.kv[layer, :, :, :tile])
            self.stream.store.flush()
            self.tail.drop_front(tile)
            self.tiles += 1

    def rollback(self) -> None:
        """Drop all pending tokens."""
        self.commit(0)

    def fill_layer(self, layer: int, kv: Tensor) -> None:
        """Prefill: all tokens of one layer at once, ``kv`` [2, K, n, D]. Follow the last layer with ``end_fill``."""
        tile, tiles = self.stream.plan.tile_tokens, self._whole_tiles(kv.shape[2])
        for index in range(tiles):
            self.stream.store.write(layer, index, kv[:, :, index * tile : (index + 1) * tile])
        self.tail.write(layer, kv[0, :, tiles * tile :], kv[1, :, tiles * tile :])
        self.stream.store.flush()

    def end_fill(self, tokens: int) -> None:
        """All layers have been filled with ``tokens`` tokens."""
        self.tiles = self._whole_tiles(tokens)
        self.tail.length = tokens - self.tiled

    def reset(self) -> None:
        """Forget everything."""
        self.tiles = 0
        self.tail.reset()

    def read(self, layer: int) -> Tensor:
        """All committed tokens of one layer as one tensor [2, K, length, D] on the device. For tests and tools."""
        parts: Iterable[Tensor] = (self.stream.store.place(layer, i) for i in range(self.tiles))
        tail = self.tail.settled[layer]
        return torch.cat([part.to(tail.device) for part in parts] + [tail], dim=2)

    def _whole_tiles(self, tokens: int) -> int:
        return max(0, tokens - self.keep) // self.stream.plan.tile_tokens
