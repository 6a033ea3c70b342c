"""Where tiles lie: pinned host memory, on the device the resident ones, and copies on their way there."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from offload_triforce.scheduler.device import Device, Event
from offload_triforce.scheduler.late import LateTiles
from offload_triforce.scheduler.pinning import Pinner, Progress, cuda_pin, cuda_unpin
from offload_triforce.scheduler.plan import TilePlan


class Leaving:
    """Copies on their way to the host: until they have landed, their sources must stay as they are."""

    def __init__(self) -> None:
        self._copies: deque[tuple[int, Event]] = deque()

    def add(self, start: int, landed: Event) -> None:
        """A copy of tokens from ``start`` on. Copies are added in order."""
        self._copies.append((start, landed))

    def wait(self, end: int | None = None) -> None:
        """Let the computation from now on come after the copies of tokens before ``end``, or after all of them."""
        while self._copies and (end is None or self._copies[0][0] < end):
            self._copies.popleft()[1].wait()


class TileStore:
    """The tiles of all layers: host memory (pinned for CUDA), and a slab on the device for the resident ones.

    Late ones are resident only from ``bring_up`` to ``give_up``. They have their place in host memory like those that
    are streamed, and everything that is written to them goes there as well. Where the device's memory is host memory,
    every tile is resident where it lies.
    """

    def __init__(self, plan: TilePlan, dtype: torch.dtype, device: Device, pinning: Progress | None = None) -> None:
        """``pinning``: told how far the pinning is, which goes on in the background (CUDA only)."""
        self.plan = plan
        self._device = device
        shape = (2, plan.kv_heads, plan.tile_tokens, plan.head_dim)
        resident = [] if device.unified else plan.resident_tiles()
        self.late = LateTiles([key for key in resident if plan.is_late(*key)], shape, dtype, device)
        early = [key for key in resident if not plan.is_late(*key)]
        self._resident = device.empty((len(early), *shape), dtype)
        self._places: dict[tuple[int, int], Tensor] = {key: self._resident[i] for i, key in enumerate(early)}
        self._early = frozenset(early)
        slabs = []
        for layer in range(plan.layers):  # one slab each
            streamed = [t for t in range(plan.tiles) if (layer, t) not in self._places]
            if device.unified:  # one tile's tokens behind the other's, see ``together``
                slabs.append(device.host_empty((2, plan.kv_heads, plan.tiles * plan.tile_tokens, plan.head_dim), dtype))
                tiles = slabs[-1].unflatten(2, (plan.tiles, plan.tile_tokens)).movedim(2, 0)
            else:
                tiles = device.host_empty((len(streamed), *shape), dtype)
                slabs.append(tiles)
            self._places.update({(layer, tile): tiles[i] for i, tile in enumerate(streamed)})
        self._slabs = slabs
        self._pinner: Pinner | None = None
        if self._resident.is_cuda:
            pin = partial(cuda_pin, device=self._resident.device)
            self._pinner = Pinner(slabs, pin, cuda_unpin, pinning or (lambda done, total: None))

    def place(self, layer: int, tile: int) -> Tensor:
        """Where this tile lies, [2, K, tile_tokens, D]: on the device if resident, else in host memory."""
        return self.late.places.get((layer, tile), self._places[layer, tile])

    def together(self, layer: int, tiles: int) -> Tensor:
        """The first tiles of a layer as one, [2, K, tiles * tile_tokens, D]. For unified memory alone."""
        return self._slabs[layer][:, :, : tiles * self.plan.tile_tokens]

    def is_resident(self, layer: int, tile: int) -> bool:
        """Whether this tile lies on the device now."""
        return self._device.unified or (layer, tile) in self._early or (layer, tile) in self.late.places

    def stream_order(self, tiles: int) -> Iterator[tuple[int, int]]:
        """The (layer, tile) that a pass fetches now, in order, when each layer has ``tiles`` whole tiles."""
        return ((la, t) for la in range(self.plan.layers) for t in range(tiles) if not self.is_resident(la, t))

    def bring_up(self, tiles: int) -> None:
        """Make the late tiles resident; of each layer, ``tiles`` have been written. The computation waits for them."""
        self.late.bring_up(self._places, tiles)

    def give_up(self) -> None:
        """Give the late tiles' memory on the device back; what they hold stays in host memory."""
        self.late.give_up()

    def write(self, layer: int, tile: int, kv: Tensor) -> Event:
        """Store a whole tile [2, K, tile_tokens, D] from the device. ``kv`` must stay as it is until the event.

        Raises:
            MemoryLimitError: its place could not be pinned.
        """
        place = self._places[layer, tile]
        if self._device.unified or (layer, tile) in self._early:
            place.copy_(kv)
            return self._device.record()
        self.late.write((layer, tile), kv)
        if self._pinner:
            self._pinner.wait(layer)
        return self._device.outgoing.submit(place, kv, after=self._device.record())

    def fetch(self, layer: int, tile: int) -> Tensor:
        """This tile on the device, [2, K, tile_tokens, D]: not to be written to. For single ones, outside of a pass."""
        place = self.place(layer, tile)
        if self.is_resident(layer, tile):
            return place
        arrived = self._device.empty(tuple(place.shape), place.dtype)
        self._device.incoming.submit(arrived, place, after=self._device.record()).wait()
        return arrived

    def put(self, layer: int, tile: int, kv: Tensor) -> None:
        """Store a whole tile [2, K, tile_tokens, D] from host memory, while nothing is on its way to its place."""
        if self._pinner:
            self._pinner.wait(layer)
        self._places[layer, tile].copy_(kv)

    def wait_pinned(self) -> None:
        """Return once all host memory is pinned. For measurements; ``write`` waits for what it needs."""
        for layer in range(self.plan.layers if self._pinner else 0):
            self._pinner.wait(layer)

    def close(self) -> None:
        """Unpin. The device must have been closed before."""
        if self._pinner:
            self._pinner.close()
