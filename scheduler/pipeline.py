"""Execution of a plan: where the tiles lie, and a ring that runs ahead of the computation."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from offload_triforce.scheduler.device import Copy, Lane
from offload_triforce.scheduler.plan import TilePlan


class Tile(NamedTuple):
    """One tile on the device: tokens [index * tile_tokens, (index + 1) * tile_tokens) as [2, K, tile_tokens, D]."""

    index: int
    kv: Tensor


class TileStore:
    """The tiles of all layers: host memory (pinned for CUDA), and a slab on the device for the resident ones."""

    def __init__(self, plan: TilePlan, dtype: torch.dtype, device: torch.device, out: Lane) -> None:
        """``out``: the lane from the device to the host."""
        self.plan = plan
        self._out = out
        self._under_way: list[Copy] = []
        shape = (2, plan.kv_heads, plan.tile_tokens, plan.head_dim)
        resident = plan.resident_tiles()
        self._resident = torch.empty((len(resident), *shape), dtype=dtype, device=device)
        self._places: dict[tuple[int, int], Tensor] = {key: self._resident[i] for i, key in enumerate(resident)}
        for layer in range(plan.layers):
            streamed = [t for t in range(plan.tiles) if (layer, t) not in self._places]
            slab = torch.empty((len(streamed), *shape), dtype=dtype, device="cpu")
            if device.type == "cuda" and slab.numel():
                pin(slab)
                weakref.finalize(self, unpin, slab)
            self._places.update({(layer, tile): slab[i] for i, tile in enumerate(streamed)})

    def place(self, layer: int, tile: int) -> Tensor:
        """Where this tile lies, [2, K, tile_tokens, D]: on the device if resident, else in host memory."""
        return self._places[layer, tile]

    def write(self, layer: int, tile: int, kv: Tensor) -> None:
        """Store a whole tile [2, K, tile_tokens, D] from the device. ``kv`` must stay as it is until ``flush``."""
        place = self.place(layer, tile)
        if self.plan.is_resident(layer, tile):
            place.copy_(kv)
        else:
            self._under_way.append(self._out.submit(place, kv))

    def flush(self) -> None:
        """Wait for all writes: after this their sources may change and the tiles may be fetched."""
        for copy in self._under_way:
            copy.wait()
        self._under_way.clear()


def pin(tensor: Tensor) -> None:
    """Page-lock a host tensor in place. torch's own pinned allocator would round its size up to a power of two.

    Raises:
        MemoryError: the system refuses, mostly for a limit on locked memory.
    """
    size = tensor.numel() * tensor.element_size()
    error = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), size, 0)
    if int(error) != 0:
        raise MemoryError(f"{size / 1e9:.1f} GB could not be pinned (CUDA error {error})")


def unpin(tensor: Tensor) -> None:
    """Undo ``pin``."""
    torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())


class TileStream:
    """Fetches the streamed tiles of a pass into a ring of device buffers, in order, as far ahead as the ring goes.

    ``begin`` starts a pass; then ``tiles(layer)`` is to be exhausted for each layer in turn. A slot is given
    to the next copy when the caller asks for the tile after it. Copies run on over layer boundaries.
    """

    def __init__(self, store: TileStore, incoming: Lane, dtype: torch.dtype, device: torch.device) -> None:
        """``incoming``: the lane from the host to the device."""
        self.store, self.plan, self._lane = store, store.plan, incoming
        shape = (self.plan.ring, 2, self.plan.kv_heads, self.plan.tile_tokens, self.plan.head_dim)
        self._ring = torch.empty(shape, dtype=dtype, device=device)
        self._tiles = 0
        self._todo: deque[tuple[int, int]] = deque()
        self._flying: deque[tuple[int, Copy]] = deque()
        self._free: list[int] = []

    def begin(self, tiles: int) -> None:
        """Start a pass over ``tiles`` whole tiles per layer. What an interrupted pass left under way is awaited."""
        while self._flying:
            self._flying.popleft()[1].wait()
        self._tiles = tiles
        self._todo = deque(self.plan.stream_order(tiles))
        self._free = list(range(self.plan.ring))
        self._run_ahead()

    def tiles(self, layer: int) -> Iterator[Tile]:
        """The tiles of one layer in order of position. Each is valid until the next one is asked for."""
        for index in range(self._tiles):
            if self.plan.is_resident(layer, index):
                yield Tile(index, self.store.place(layer, index))
                continue
            slot, copy = self._flying.popleft()
            copy.wait()
            yield Tile(index, self._ring[slot])
            self._free.append(slot)
            self._run_ahead()

    def _run_ahead(self) -> None:
        while self._free and self._todo:
            slot = self._free.pop()
            copy = self._lane.submit(self._ring[slot], self.store.place(*self._todo.popleft()))
            self._flying.append((slot, copy))
