"""Coded tiles: how they leave the device, lie in host memory, and come back. Not a bit of them is lost.

A tile is coded at a fixed rate (see ``WireFormat``), into a place of a fixed size. Whether it fits stands in its first
bytes, so the host knows when they have landed: a tile that does not is stored once more as it is, raw, in host memory
that is allocated for it, and crosses the link raw until it is written anew.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from offload_triforce.errors import MemoryLimitError
from offload_triforce.kernels import ops
from offload_triforce.kernels.wire_format import WireFormat
from offload_triforce.scheduler.device import Device, Event

Key = tuple[int, int]  # layer, tile


class CodedTiles:
    """Codes and decodes the tiles of a store.

    Each lane of the link has one coded tile on the device that all its copies pass through, in the lane's order.

    Attributes:
        format: of a tile. rooms: where tiles lie, or have lain, that do not fit it.
    """

    def __init__(
        self,
        form: WireFormat,
        device: Device,
        pin: Callable[[Tensor], None] | None = None,
        free: Callable[[], int] | None = None,
    ) -> None:
        """``pin``: what host memory needs for copies. ``free``: bytes of it that may still be taken."""
        self.format = form
        self.rooms: dict[Key, Tensor] = {}
        self._device, self._pin, self._free = device, pin, free
        self._leaving, self._coming = device.empty((2, form.bytes), torch.uint8)
        self._raw: set[Key] = set()  # tiles that did not fit when they were last written
        self._newest: weakref.WeakValueDictionary[Key, _Written] = weakref.WeakValueDictionary()

    def source(self, key: Key, place: Tensor) -> Tensor:
        """What is to cross the link: the coded tile at its ``place``, bytes (n,), or the raw one."""
        return self.rooms[key] if key in self._raw else place

    def send(self, key: Key, place: Tensor, kv: Tensor) -> Event:
        """Code a tile [2, K, T, D] on the device, and store it at its ``place`` in host memory.

        ``kv`` must stay as it is until the event, and the event be kept: waiting for it settles whether the tile fits.
        """
        encode = partial(ops.wire_encode, kv, self._leaving, self.format)
        landed = self._device.outgoing.submit(place, self._leaving, after=self._device.record(), first=encode)
        written = _Written(partial(self._settle, key, place), kv, landed)
        self._newest[key] = written
        return written

    def bring(self, source: Tensor, target: Tensor, after: Event) -> Event:
        """Bring a tile from where it lies to the device, decoded: into ``target`` [2, K, T, D]."""
        if source.shape == target.shape:
            return self._device.incoming.submit(target, source, after=after)
        decode = partial(ops.wire_decode, self._coming, target, self.format)
        return self._device.incoming.submit(self._coming, source, after=after, then=decode)

    def put(self, key: Key, place: Tensor, kv: Tensor) -> None:
        """Store a tile from host memory, coded by the host.

        Raises:
            MemoryLimitError: it does not fit, and there is no memory for it as it is.
        """
        ops.wire_encode(kv, place, self.format)
        if fits(place):
            self._raw.discard(key)
        else:
            self._room(key, kv).copy_(kv)
            self._raw.add(key)

    def read(self, coded: Tensor) -> Tensor:
        """A coded tile in host memory, decoded by the host: [2, K, T, D]."""
        form = self.format
        kv = torch.empty(2, form.kv_heads, form.tile_tokens, form.head_dim, dtype=form.dtype)
        ops.wire_decode(coded, kv, form)
        return kv

    def _settle(self, key: Key, place: Tensor, written: _Written) -> None:
        """What has landed counts, unless the tile has been written anew since."""
        if self._newest.get(key) is not written:
            return
        if fits(place):
            self._raw.discard(key)
            return
        room = self._room(key, written.kv)
        self._device.outgoing.submit(room, written.kv, after=self._device.record()).wait()
        self._raw.add(key)

    def _room(self, key: Key, kv: Tensor) -> Tensor:
        """Where a tile lies raw."""
        if key not in self.rooms:
            if self._free is not None and (free := self._free()) < kv.nbytes:
                raise MemoryLimitError(
                    f"a tile of the KV cache cannot be coded any smaller, and takes {kv.nbytes / 1e6:.1f} MB of host "
                    f"memory as it is, where {free / 1e6:.1f} MB are free; free some memory and go on"
                )
            room = self._device.host_empty(tuple(kv.shape), kv.dtype)
            if self._pin is not None:
                self._pin(room)
            self.rooms[key] = room
        return self.rooms[key]


class _Written:
    """A coded tile on its way to host memory. Waiting for it, the host finds out whether it fits."""

    def __init__(self, settle: Callable[[_Written], None], kv: Tensor, landed: Event) -> None:
        self.kv: Tensor | None = kv
        self._settle, self._landed = settle, landed

    def wait(self) -> None:
        """Settle it, once; where there is no memory for what does not fit, it can be tried again.

        Raises:
            MemoryLimitError: there is none.
        """
        self._landed.reach()
        if self.kv is not None:
            self._settle(self)
            self.kv = None

    def arrived(self) -> bool:
        return self._landed.arrived()

    def reach(self) -> None:
        self._landed.reach()


def fits(place: Tensor) -> bool:
    """Whether what lies there, bytes (n,) in host memory, is all of a tile: no escapes were left over."""
    return not place[:4].view(torch.int32).item()
