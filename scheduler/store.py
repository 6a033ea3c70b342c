"""Where tiles lie: pinned host memory, a slab on the device for the resident ones, and copies on their way there."""

from __future__ import annotations

from collections import deque
from functools import partial

import torch
from torch import Tensor

from offload_triforce.scheduler.device import Device, Event
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
    """The tiles of all layers: host memory (pinned for CUDA), and a slab on the device for the resident ones."""

    def __init__(self, plan: TilePlan, dtype: torch.dtype, device: Device, pinning: Progress | None = None) -> None:
        """``pinning``: told how far the pinning is, which goes on in the background (CUDA only)."""
        self.plan = plan
        self._device = device
        shape = (2, plan.kv_heads, plan.tile_tokens, plan.head_dim)
        resident = plan.resident_tiles()
        self._resident = device.empty((len(resident), *shape), dtype)
        self._places: dict[tuple[int, int], Tensor] = {key: self._resident[i] for i, key in enumerate(resident)}
        slabs = []
        for layer in range(plan.layers):  # one slab each
            streamed = [t for t in range(plan.tiles) if (layer, t) not in self._places]
            slabs.append(device.host_empty((len(streamed), *shape), dtype))
            self._places.update({(layer, tile): slabs[-1][i] for i, tile in enumerate(streamed)})
        self._pinner: Pinner | None = None
        if self._resident.is_cuda:
            pin = partial(cuda_pin, device=self._resident.device)
            self._pinner = Pinner(slabs, pin, cuda_unpin, pinning or (lambda done, total: None))

    def place(self, layer: int, tile: int) -> Tensor:
        """Where this tile lies, [2, K, tile_tokens, D]: on the device if resident, else in host memory."""
        return self._places[layer, tile]

    def write(self, layer: int, tile: int, kv: Tensor) -> Event:
        """Store a whole tile [2, K, tile_tokens, D] from the device. ``kv`` must stay as it is until the event.

        Raises:
            MemoryLimitError: its place could not be pinned.
        """
        place = self.place(layer, tile)
        if self.plan.is_resident(layer, tile):
            place.copy_(kv)
            return self._device.record()
        if self._pinner:
            self._pinner.wait(layer)
        return self._device.outgoing.submit(place, kv, after=self._device.record())

    def wait_pinned(self) -> None:
        """Return once all host memory is pinned. For measurements; ``write`` waits for what it needs."""
        for layer in range(self.plan.layers if self._pinner else 0):
            self._pinner.wait(layer)

    def close(self) -> None:
        """Unpin. The device must have been closed before."""
        if self._pinner:
            self._pinner.close()
