"""Late tiles: resident while decoding, in memory that the prefill needs while it reads the prompt.

The prefill holds one layer's keys and values and all hidden states; decoding needs none of it. When the prompt has been
read, tiles come up from host memory into what has become free, once, and stay for all passes. Before the next
prompt they go again.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from offload_triforce.scheduler.device import Device, Event

Key = tuple[int, int]  # layer, tile
# Brings a tile from host memory to its place on the device, after an event; the event says that it is there.
Bring = Callable[[Key, Tensor, Event], Event]
# Late tiles are allocated in blocks of about this size: each fits into a hole that one large slab would not fit into,
# and it is large enough for torch's allocator to ask the driver for just as much.
BLOCK_BYTES = 256 << 20


class LateTiles:
    """The late tiles of a store, as far as they lie on the device.

    Attributes:
        places: where those lie that are on the device with all that they hold, [2, K, tile_tokens, D] each.
        moved: bytes that have come up so far.
    """

    def __init__(self, keys: Sequence[Key], shape: tuple[int, ...], dtype: torch.dtype, device: Device) -> None:
        """``shape``: of one tile. Nothing is allocated before they are brought up."""
        self.places: dict[Key, Tensor] = {}
        self.moved = 0
        self._keys, self._shape, self._dtype, self._device = list(keys), shape, dtype, device
        self._room: dict[Key, Tensor] = {}

    def bring_up(self, bring: Bring, tiles: int) -> None:
        """Let ``bring`` bring them up from host memory. Those of each layer from ``tiles`` on hold nothing yet.

        Those for which there is no memory left are streamed as others are: that is slower, and changes nothing else.
        """
        if not self._keys:
            return
        if not self._room:
            self._allocate()
        missing = [key for key in self._room if key[1] < tiles and key not in self.places]
        issued, landed, before = self._device.record(), [], self._device.incoming.moved
        for key in missing:
            landed.append(bring(key, self._room[key], issued))
            self.places[key] = self._room[key]
        self.moved += self._device.incoming.moved - before
        for event in landed:
            event.wait()

    def write(self, key: Key, kv: Tensor) -> None:
        """A tile [2, K, tile_tokens, D] that is being written to host memory: it need not come up any more."""
        if key in self._room:
            self._room[key].copy_(kv)
            self.places[key] = self._room[key]

    def give_up(self) -> None:
        """Free their memory on the device, for pieces of any size."""
        if self._room:
            self.places.clear()
            self._room.clear()
            self._device.reclaim()

    def _allocate(self) -> None:
        self._device.reclaim()
        size = math.prod(self._shape) * self._dtype.itemsize
        step = max(1, BLOCK_BYTES // size)
        for start in range(0, len(self._keys), step):
            keys = self._keys[start : start + step]
            try:
                block = self._device.empty((len(keys), *self._shape), self._dtype)
            except torch.OutOfMemoryError:
                short = (len(self._keys) - start) * size
                warnings.warn(
                    f"the device has {short / 1e9:.1f} GB less room for resident tiles than planned: they are "
                    "streamed, which is slower",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return
            self._room.update(zip(keys, block, strict=True))
