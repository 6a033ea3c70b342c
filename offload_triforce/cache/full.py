"""The full KV cache: tiles in host memory (or resident on the device), and a tail of the newest tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from offload_triforce.cache.buffer import GrowingBuffer, TreeStep
from offload_triforce.cache.layer import Snapshot
from offload_triforce.cache.sizes import tail_capacity
from offload_triforce.kernels import ops
from offload_triforce.scheduler.pipeline import Tile, TileStream
from offload_triforce.scheduler.store import Leaving


class TileObserver(Protocol):
    """Somebody who looks at the keys and values that a pass attends, in order, while they are on the device."""

    def see(self, start: int, kv: Tensor) -> None:
        """Tokens from position ``start`` on, [2, K, n, D]."""


# From the packed queries [K, G*T, D], their log-sum-exp over the tail [K, G*T], and the scaling.
Observe = Callable[[Tensor, Tensor, float], TileObserver]


class FullCache:
    """Every token's KV for the layers that attend to everything. Append-only, with an explicit commit.

    Tokens [0, tiled) are read from whole tiles, held by the ``stream``'s store; tokens [tiled, length) are the tail,
    on the device, followed by pending tokens of a pass that has not been judged yet. Pending tokens never leave the
    device. When the tail has a whole tile to spare, that tile leaves for the host beside the next pass, which
    still reads it in the tail; it counts as tiled from the commit after that.
    """

    def __init__(
        self, stream: TileStream, keep: int, block: int, news: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """``keep``: newest tokens that stay on the device.

        ``block``: most tokens pending at once. ``news``: most of them that one commit accepts.
        """
        plan = stream.plan
        self.stream = stream
        self.keep = keep
        self.tail = GrowingBuffer(
            plan.layers, plan.kv_heads, tail_capacity(plan, keep, block, news), plan.head_dim, dtype, device
        )
        self.tiles = 0
        self._attention = ops.RunningAttention()
        self._leaving, self._left = Leaving(), 0  # copies of the first so many tiles of the tail

    @property
    def tiled(self) -> int:
        """Tokens that are read from whole tiles."""
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
        params: ops.AttentionParams,
        observe: Observe | None = None,
        step: TreeStep | None = None,
        idle: Callable[[], object] | None = None,
    ) -> Tensor:
        """Attention of the step's T new tokens over all that is held: query [H, T, D] -> [H, T, D].

        The new tokens' ``key`` and ``value`` [K, T, D] become pending; ``step`` as for the buffer. ``observe``, called
        with the packed queries and their attention over the tail, may return an observer of the tokens that pass by.
        ``idle`` is called where the device would otherwise wait for a tile to arrive.
        """
        attention, device = self._attention, self.stream.device
        attention.start(query, key.shape[0], params)
        tail = self.tail.attend_on(attention, layer, key, value, params, step)
        observer = observe(attention.packed, attention.logsumexp(), params.scaling) if observe else None
        for tile in self.stream.tiles(layer, idle):
            device.launch(f"layer {layer}, tile {tile.index}", self._take, tile, observer)
        device.finish()
        if observer:
            observer.see(self.tiled, tail[:, :, : self.tail.committed])
        return attention.finish()

    def _take(self, tile: Tile, observer: TileObserver | None) -> None:
        self._attention.update_tile(tile.kv)
        if observer:
            observer.see(tile.index * self.stream.plan.tile_tokens, tile.kv)

    def end_step(self, tokens: int) -> None:
        """The step is through all layers: its tokens are pending."""
        self.tail.end_step(tokens)

    def select(self, kept: Sequence[int]) -> None:
        """Keep these of the pending tokens (their numbers, ascending) and drop the others; those stay pending."""
        self.tail.select(kept)

    def commit(self, tokens: int) -> None:
        """Accept the first ``tokens`` pending tokens, drop the others; whole tiles begin to leave the tail."""
        self._land()
        self.tail.commit(tokens)
        self._send()

    def _send(self) -> None:
        """Whole tiles that the tail has to spare begin to leave."""
        tile, store = self.stream.plan.tile_tokens, self.stream.store
        while self.tail.length - self._left * tile >= tile + self.keep:
            start = self._left * tile
            for layer in range(self.stream.plan.layers):
                source = self.tail.kv[layer, :, :, start : start + tile]
                self._leaving.add(start, store.write(layer, self.tiles + self._left, source))
            self._left += 1

    def _land(self) -> None:
        """What has left is from now on read from its tiles."""
        self.landed()
        self.tail.drop_front(self._left * self.stream.plan.tile_tokens)
        self.tiles += self._left
        self._left = 0

    def begin_fill(self) -> None:
        """A prefill begins, behind what is held: the device has room for it, and the tiles begin to stream."""
        self._settle()
        self.stream.store.give_up()
        self.stream.begin(self.tiles)

    def load(self, layer: int, kv: Tensor) -> None:
        """Bring one layer's committed tokens to the device, into ``kv`` [2, K, length, D]. Layers in order."""
        tile = self.stream.plan.tile_tokens
        device = self.stream.device
        for part in self.stream.tiles(layer):
            place = kv.narrow(2, part.index * tile, part.kv.shape[2])
            device.launch(f"layer {layer}, tile {part.index}", place.copy_, part.kv)
        device.finish()
        kv[:, :, self.tiled :] = self.tail.settled[layer]

    def fill(self, layer: int, kv: Tensor, queries: Tensor, params: ops.AttentionParams) -> Leaving:
        """See ``FilledLayers``. Whole tiles leave for their places at once; those that are there stay."""
        tile, tiles = self.stream.plan.tile_tokens, self._whole_tiles(kv.shape[2])
        leaving = Leaving()
        for index in range(self.tiles, tiles):
            start = index * tile
            landed = self.stream.store.write(layer, index, kv[:, :, start : start + tile])
            leaving.add(start, landed)
            self._leaving.add(start, landed)
        self.tail.replace(layer, kv[:, :, tiles * tile :])
        return leaving

    def end_fill(self, tokens: int) -> None:
        """All layers have been filled with ``tokens`` tokens. What a prefill held must be free: late tiles come up."""
        self._leaving.wait()
        self.tiles = self._whole_tiles(tokens)
        self.tail.length = tokens - self.tiled
        self.stream.store.bring_up(self.tiles)

    def cut(self, tokens: int) -> None:
        """Forget all but the first ``tokens`` tokens. Those of tiles that are no longer whole return to the tail.

        Raises:
            IndexError: there are not so many.
        """
        self._settle()
        if not 0 <= tokens <= self.length:
            raise IndexError(f"cannot keep {tokens} of {self.length} tokens")
        tile, tiles = self.stream.plan.tile_tokens, self._whole_tiles(tokens)
        first, returning = tiles * tile, range(tiles, min(self.tiles, -(-tokens // tile)))
        staying = self.tail.settled[:, :, :, : max(0, tokens - self.tiled)].clone()  # it moves over itself
        for layer in range(self.stream.plan.layers):
            for index in returning:
                part = self.stream.store.fetch(layer, index)[:, :, : tokens - index * tile]
                self.tail.kv[layer, :, :, index * tile - first :][:, :, : part.shape[2]] = part
        self.tail.kv[:, :, :, self.tiled - first :][:, :, :, : staying.shape[3]] = staying
        self.tiles = tiles
        self.tail.length = tokens - first

    def copy_out(self, layer: int, start: int, stop: int) -> Tensor:
        """Committed tokens [start, stop) of one layer, [2, K, stop - start, D], in host memory. After ``still``."""
        return self._gather(layer, start, stop, self.tiles)

    def filled(self, layer: int, start: int, stop: int) -> Tensor:
        """A copy of the same, of a layer that ``fill`` has given ``stop`` tokens, whether others have theirs or not.

        After ``landed``, and when the device has caught up.
        """
        return self._gather(layer, start, stop, self._whole_tiles(stop)).clone()

    def _gather(self, layer: int, start: int, stop: int, tiles: int) -> Tensor:
        """The layer's first ``tiles`` tiles lie in the store, the rest in the tail."""
        tile, store, parts = self.stream.plan.tile_tokens, self.stream.store, []
        for index in range(start // tile, min(tiles, -(-stop // tile))):
            first = index * tile
            parts.append(store.read(layer, index)[:, :, max(0, start - first) : stop - first].cpu())
        tiled = tiles * tile
        if stop > tiled or not parts:
            parts.append(self.tail.kv[layer][:, :, max(0, start - tiled) : max(0, stop - tiled)].cpu())
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def adopt(self, tokens: int, read: Callable[[int, int, int], Tensor]) -> None:
        """Hold ``tokens`` tokens that were read before: ``read(layer, start, stop)`` is what ``copy_out`` was of them.

        On empty caches, after ``still``.
        """
        plan, store = self.stream.plan, self.stream.store
        self.tiles = self._whole_tiles(tokens)
        for layer in range(plan.layers):
            for index in range(self.tiles):
                first = index * plan.tile_tokens
                store.put(layer, index, read(layer, first, first + plan.tile_tokens))
            self.tail.replace(layer, read(layer, self.tiled, tokens))
        self.tail.length = tokens - self.tiled
        store.bring_up(self.tiles)

    def still(self) -> None:
        """Nothing is pending, and all that was on its way to host memory is there for the host to read."""
        self._settle()
        self.stream.device.catch_up()

    def landed(self) -> None:
        """What is on its way has landed, and can be read. Nothing else is changed.

        Raises:
            MemoryLimitError: see ``Leaving.wait``.
        """
        self._leaving.wait()

    def _settle(self) -> None:
        """Nothing is pending, and nothing on its way."""
        self.tail.commit(0)
        self._land()

    def reset(self) -> None:
        """Forget everything, and make room on the device for a prefill."""
        self._leaving.forget()
        self.stream.store.give_up()
        self.stream.forget_speed()
        self.tiles = self._left = 0
        self.tail.reset()

    def snapshot(self) -> dict[str, Tensor]:
        """See ``CacheLayers``: how many tiles there are, and the tail. The tiles themselves stay where they are."""
        return {"tiles": torch.tensor([self.tiles]), "tail": self.tail.snapshot()["kv"]}

    def restore(self, snapshot: Snapshot) -> None:
        """See ``CacheLayers``. The tiles must hold what they held then: the same text may have gone on since.

        What tiles on their way become is written again.
        """
        self._leaving.forget()
        self._left = 0
        self.tiles = int(snapshot["tiles"])
        self.tail.restore({"kv": snapshot["tail"]})
        self.stream.store.bring_up(self.tiles)
        self._send()

    def read(self, layer: int) -> Tensor:
        """All committed tokens of one layer as one tensor [2, K, length, D] on the device. For tests and tools."""
        parts: Iterable[Tensor] = (self.stream.store.read(layer, i) for i in range(self.tiles))
        tail = self.tail.settled[layer]
        return torch.cat([part.to(tail.device) for part in parts] + [tail], dim=2)

    def _whole_tiles(self, tokens: int) -> int:
        return max(0, tokens - self.keep) // self.stream.plan.tile_tokens
