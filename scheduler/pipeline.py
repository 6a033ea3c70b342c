"""Execution of a plan: where the tiles lie, and a ring that runs ahead of the computation."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from offload_triforce.scheduler.clock import Mark
from offload_triforce.scheduler.device import Device, Event
from offload_triforce.scheduler.plan import aligned
from offload_triforce.scheduler.ring import Ring
from offload_triforce.scheduler.store import TileStore


class Tile(NamedTuple):
    """One tile on the device: tokens [index * tile_tokens, (index + 1) * tile_tokens) as [2, K, tile_tokens, D].

    Where tiles are attended to where they lie, all of a layer's come as one, index 0.
    """

    index: int
    kv: Tensor


class Slack(NamedTuple):
    """What a pass leaves the computation time for, in seconds.

    Attributes:
        spare: in which it waited for tiles on their way, or did something else meanwhile that cost the link nothing.
        longest: how long one piece of other work may take, until the ring is full and the link stands still.
    """

    spare: float = 0.0
    longest: float = 0.0


class TileStream:
    """Fetches the streamed tiles of a pass into a ring on the device, in order, as far ahead as the ring goes.

    ``begin`` starts a pass; then ``tiles(layer)`` is to be exhausted for each layer in turn. A tile's place in the ring
    is given to the next copy when the caller asks for the tile after it. A coded tile is decoded into a buffer of its
    own when it has landed, which frees its place; one buffer is enough, since the computation decodes and attends in
    order. Copies run on over layer boundaries.
    """

    def __init__(self, store: TileStore, device: Device, dtype: torch.dtype) -> None:
        self.store, self.plan, self.device = store, store.plan, device
        shape = (2, self.plan.kv_heads, self.plan.tile_tokens, self.plan.head_dim)
        self._ring = Ring(device.empty((0 if device.unified else self.plan.ring_bytes,), torch.uint8))
        self._decoded = device.empty(shape, dtype) if self.plan.coded_bytes else None
        self._tiles = 0
        self._waits: list[Callable[[], float]] = []
        # Other work in the pass: from where, to where, and how long the ring covers such a piece.
        self._others: list[tuple[Mark, Mark, float]] = []
        self._begun, self._fetched = 0.0, 0  # when the pass began, and bytes that it has asked for
        self._rate = 0.0  # bytes per second of the fastest pass of this text
        self._todo: Iterator[tuple[int, int]] = iter(())
        self._next: tuple[int, int] | None = None  # that is to be fetched next
        self._flying: deque[tuple[Tensor, Tensor, Event]] = deque()  # regions of the ring, as such and as tiles
        self._shaped: dict[Tensor, Tensor] = {}  # regions as raw tiles; the host makes each only once

    def begin(self, tiles: int) -> None:
        """Start a pass over ``tiles`` whole tiles per layer. What an interrupted pass left under way is awaited."""
        while self._flying:
            self._flying.popleft()[2].wait()
        self._tiles = tiles
        self._waits.clear()
        self._others.clear()
        self._begun, self._fetched = time.perf_counter(), 0
        self._todo = self.store.stream_order(tiles)
        self._next = next(self._todo, None)
        self._ring.begin(self.device.record())  # all that still reads the ring, and all that the tiles were written by
        self._run_ahead()

    def tiles(self, layer: int, idle: Callable[[], object] | None = None) -> Iterator[Tile]:
        """The tiles of one layer in order of position. Each is valid until the next one is asked for.

        ``idle`` is called before the computation waits for a tile that is still on its way. What it does should take
        no longer than ``slack`` says, or the link stands still.
        """
        if self.device.unified and self._tiles:
            yield Tile(0, self.store.together(layer, self._tiles))
            return
        for index in range(self._tiles):
            if self.store.is_resident(layer, index):
                yield Tile(index, self.store.place(layer, index))
                continue
            region, kv, landed = self._flying.popleft()
            if idle is not None and not landed.arrived():
                self.device.finish()
                began = self.device.mark()  # tiles that are queued before it are no part of it
                idle()
                self._others.append((began, self.device.mark(), self._longest()))
            self._waits.append(self.device.await_landing(landed))
            if kv.dtype == torch.uint8:
                self.device.launch(f"decode layer {layer}, tile {index}", self.store.decode, kv, self._decoded)
                self._give_back(region)
                yield Tile(index, self._decoded)
            else:
                yield Tile(index, kv)
                self._give_back(region)

    def _give_back(self, region: Tensor) -> None:
        """The computation is through with what lies there: the next copies may come."""
        self._ring.give_back(self.device.release(region))
        self._run_ahead()

    def forget_speed(self) -> None:
        """What the link does is measured anew: what ran before may have run under other conditions."""
        self._rate = 0.0

    def slack(self) -> Slack:
        """Of the last pass. To be asked when it is over, and its results have been looked at."""
        if not self._fetched:
            return Slack()
        self._rate = max(self._rate, self._fetched / (time.perf_counter() - self._begun))
        covered = sum(min(ended.since(began), longest) for began, ended, longest in self._others)
        return Slack(sum(wait() for wait in self._waits) + covered, self._longest())

    def _longest(self) -> float:
        return self.plan.ring_bytes / self._rate if self._rate else 0.0

    def _run_ahead(self) -> None:
        """Submit copies as far as the ring has room. Their order is that of the pass: none waits behind a later one."""
        while self._next is not None:
            source = self.store.source(*self._next)
            room = self._ring.take(aligned(source.nbytes) if self.plan.coded_bytes else source.nbytes)
            if room is None:
                return
            region, free = room
            kv = self._as_tile(region, source)
            landed = self.device.incoming.submit(kv, source, after=free)
            self._fetched += source.nbytes
            self.store.count(source.nbytes)
            self._flying.append((region, kv, landed))
            self._next = next(self._todo, None)

    def _as_tile(self, region: Tensor, tile: Tensor) -> Tensor:
        """A region in a tile's shape and dtype; coded tiles are bytes themselves."""
        if tile.dtype == torch.uint8:
            return region
        if region not in self._shaped:
            self._shaped[region] = region[: tile.nbytes].view(tile.dtype).view(tile.shape)
        return self._shaped[region]
