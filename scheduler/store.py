"""Where tiles lie: pinned host memory, on the device the resident ones, and copies on their way there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from offload_triforce.kernels import ops
from offload_triforce.kernels.wire_format import WireFormat
from offload_triforce.scheduler.codec import CodedTiles
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
        """Let the computation from now on come after the copies of tokens before ``end``, or after all of them.

        Raises:
            MemoryLimitError: a coded tile does not fit, and there is no memory for it raw. It can be tried again.
        """
        while self._copies and (end is None or self._copies[0][0] < end):
            self._copies[0][1].wait()
            self._copies.popleft()

    def forget(self) -> None:
        """What is on its way is not wanted any more; the host waits until the sources are free."""
        copies, self._copies = self._copies, deque()
        for _, landed in copies:
            landed.reach()


class TileStore:
    """The tiles of all layers: host memory (pinned for CUDA), and a slab on the device for the resident ones.

    In host memory they lie coded, where the plan says so (see ``codec``), and on the device raw. Late ones are resident
    only from ``bring_up`` to ``give_up``. They have their place in host memory like those that are streamed, and
    everything that is written to them goes there as well. Where the device's memory is host memory, every tile is
    resident where it lies, raw.

    Attributes:
        saved: bytes that coding has kept off the link so far, both directions.
    """

    def __init__(
        self,
        plan: TilePlan,
        dtype: torch.dtype,
        device: Device,
        pinning: Progress | None = None,
        free: Callable[[], int] | None = None,
    ) -> None:
        """``pinning``: told how far the pinning is, which goes on in the background (CUDA only).

        ``free``: bytes of host memory that may still be taken, for tiles that cannot be coded.
        """
        self.plan = plan
        self.saved = 0
        self._device = device
        shape = (2, plan.kv_heads, plan.tile_tokens, plan.head_dim)
        resident = [] if device.unified else plan.resident_tiles()
        self.late = LateTiles([key for key in resident if plan.is_late(*key)], shape, dtype, device)
        early = [key for key in resident if not plan.is_late(*key)]
        self._resident = device.empty((len(early), *shape), dtype)
        self._places: dict[tuple[int, int], Tensor] = {key: self._resident[i] for i, key in enumerate(early)}
        form, place, kind = None, shape, dtype
        if plan.coded_bytes and not device.unified:
            form = WireFormat(plan.kv_heads, plan.tile_tokens, plan.head_dim, dtype)
            place, kind = (form.bytes,), torch.uint8
        slabs = []
        for layer in range(plan.layers):  # one slab each
            streamed = [t for t in range(plan.tiles) if (layer, t) not in self._places]
            if device.unified:  # one tile's tokens behind the other's, see ``together``
                slabs.append(device.host_empty((2, plan.kv_heads, plan.tiles * plan.tile_tokens, plan.head_dim), dtype))
                tiles = slabs[-1].unflatten(2, (plan.tiles, plan.tile_tokens)).movedim(2, 0)
            else:
                tiles = device.host_empty((len(streamed), *place), kind)
                slabs.append(tiles)
            self._places.update({(layer, tile): tiles[i] for i, tile in enumerate(streamed)})
        self._slabs = slabs
        self._early = frozenset(self._places if device.unified else early)
        self._pinner: Pinner | None = None
        pin = None
        if self._resident.is_cuda:
            pin = partial(cuda_pin, device=self._resident.device)
            self._pinner = Pinner(slabs, pin, cuda_unpin, pinning or (lambda done, total: None))
        self._codec = None if form is None else CodedTiles(form, device, pin, free)

    def place(self, layer: int, tile: int) -> Tensor:
        """Where this tile lies: on the device if resident, [2, K, tile_tokens, D]; else in host memory: ``source``."""
        return self.late.places[layer, tile] if (layer, tile) in self.late.places else self.source(layer, tile)

    def source(self, layer: int, tile: int) -> Tensor:
        """What a copy of this tile reads: bytes (n,) if it lies coded in host memory, else [2, K, tile_tokens, D]."""
        place = self._places[layer, tile]
        if self._codec is None or (layer, tile) in self._early:
            return place
        return self._codec.source((layer, tile), place)

    def decode(self, coded: Tensor, kv: Tensor) -> None:
        """Decode a coded tile, bytes (n,) on the device, into ``kv`` [2, K, tile_tokens, D]."""
        ops.wire_decode(coded, kv, self._codec.format)

    def together(self, layer: int, tiles: int) -> Tensor:
        """The first tiles of a layer as one, [2, K, tiles * tile_tokens, D]. For unified memory alone."""
        return self._slabs[layer][:, :, : tiles * self.plan.tile_tokens]

    def is_resident(self, layer: int, tile: int) -> bool:
        """Whether this tile lies on the device now."""
        return (layer, tile) in self._early or (layer, tile) in self.late.places

    def stream_order(self, tiles: int) -> Iterator[tuple[int, int]]:
        """The (layer, tile) that a pass fetches now, in order, when each layer has ``tiles`` whole tiles."""
        return ((la, t) for la in range(self.plan.layers) for t in range(tiles) if not self.is_resident(la, t))

    def bring_up(self, tiles: int) -> None:
        """Make the late tiles resident; of each layer, ``tiles`` have been written. The computation waits for them."""
        self.late.bring_up(self._bring, tiles)

    def give_up(self) -> None:
        """Give the late tiles' memory on the device back; what they hold stays in host memory."""
        self.late.give_up()

    def write(self, layer: int, tile: int, kv: Tensor) -> Event:
        """Store a whole tile [2, K, tile_tokens, D] from the device. ``kv`` must stay as it is until the event.

        Where tiles are coded, the host waits for the event too: only then does it know whether this one fits.

        Raises:
            MemoryLimitError: its place could not be pinned.
        """
        place = self._places[layer, tile]
        if (layer, tile) in self._early:
            place.copy_(kv)
            return self._device.record()
        self.late.write((layer, tile), kv)
        if self._pinner:
            self._pinner.wait(layer)
        if self._codec is not None:
            self.count(self.plan.wire_bytes)
            return self._codec.send((layer, tile), place, kv)
        return self._device.outgoing.submit(place, kv, after=self._device.record())

    def count(self, crossing: int) -> None:
        """A tile crosses the link in so many bytes."""
        self.saved += self.plan.tile_bytes - crossing

    def _bring(self, key: tuple[int, int], target: Tensor, after: Event) -> Event:
        """Bring a tile from host memory to the device, raw."""
        source = self.source(*key)
        self.count(source.nbytes)
        if self._codec is not None:
            return self._codec.bring(source, target, after)
        return self._device.incoming.submit(target, source, after=after)

    def fetch(self, layer: int, tile: int) -> Tensor:
        """This tile on the device, [2, K, tile_tokens, D]: not to be written to. For single ones, outside of a pass."""
        if self.is_resident(layer, tile):
            return self.place(layer, tile)
        arrived = self._device.empty(tuple(self._resident.shape[1:]), self._resident.dtype)
        self._bring((layer, tile), arrived, self._device.record()).wait()
        return arrived

    def read(self, layer: int, tile: int) -> Tensor:
        """This tile, [2, K, tile_tokens, D], for the host: raw, on the device if resident. Not to be written to."""
        place = self.place(layer, tile)
        return self._codec.read(place) if place.dtype == torch.uint8 else place

    def put(self, layer: int, tile: int, kv: Tensor) -> None:
        """Store a whole tile [2, K, tile_tokens, D] from host memory, while nothing is on its way to its place."""
        if self._pinner:
            self._pinner.wait(layer)
        place = self._places[layer, tile]
        if self._codec is None or (layer, tile) in self._early:
            place.copy_(kv)
        else:
            self._codec.put((layer, tile), place, kv)

    def wait_pinned(self) -> None:
        """Return once all host memory is pinned. For measurements; ``write`` waits for what it needs."""
        for layer in range(self.plan.layers if self._pinner else 0):
            self._pinner.wait(layer)

    def close(self) -> None:
        """Unpin. The device must have been closed before."""
        if self._pinner:
            self._pinner.close()
            for room in self._codec.rooms.values() if self._codec is not None else ():
                cuda_unpin(room)
