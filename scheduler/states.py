"""Where the hidden states of a prompt wait between two layers: on the device, or in host memory.

A layer-major prefill takes every chunk through one layer before the next, so all chunks' states wait somewhere: 7 GB of
them at a million tokens. In host memory they take three chunks of the device: one arrives, one is computed, one leaves.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from offload_triforce.errors import UnsupportedModelError
from offload_triforce.scheduler.device import Device, Event
from offload_triforce.scheduler.pinning import Pinner, cuda_pin, cuda_unpin
from offload_triforce.scheduler.plan import SLOTS

# Host memory is pinned in pieces of about this size, so that the first chunks need not wait for all of it.
PIECE_BYTES = 512 << 20


class HiddenStates(Protocol):
    """The states of all chunks of one prompt. Chunks are put in order, then taken and put in order for each layer."""

    def begin(self, first: Tensor, tokens: int) -> None:
        """A prompt of that many tokens follows. ``first``: the states of its first chunk, [1, T, width]."""

    def take(self, index: int) -> Tensor:
        """The states of a chunk, [1, T, width]: good until the chunk is put."""

    def put(self, index: int, states: Tensor, keep: bool = True) -> None:
        """What became of a chunk. Without ``keep`` nobody will take it again."""

    def kept(self) -> Tensor | None:
        """A copy of what all chunks have come to, [tokens, width], in host memory. Before ``end``.

        None if a step that was interrupted has changed what it took.
        """

    def go_on(self, states: Tensor, index: int, last: bool) -> None:
        """After ``begin``: all are as ``kept`` had them; chunk ``index`` is taken next, in the last layer or not."""

    def end(self) -> None:
        """The prompt has been read, or given up."""


class DeviceStates:
    """All of them on the device, in one tensor: of many, torch's allocator would waste what is left over in each."""

    def __init__(self, chunk: int) -> None:
        """``chunk``: tokens of every chunk but the last."""
        self._chunk, self._held = chunk, torch.empty(0)
        self._version = 0  # as torch counts changes in place: when the newest chunk was taken, or put

    def begin(self, first: Tensor, tokens: int) -> None:
        """See ``HiddenStates``."""
        self._held = first.new_empty(1, tokens, first.shape[2])

    def take(self, index: int) -> Tensor:
        """See ``HiddenStates``."""
        self._version = _version(self._held)
        return self._place(index)

    def put(self, index: int, states: Tensor, keep: bool = True) -> None:
        """See ``HiddenStates``."""
        if keep:
            self._place(index).copy_(states)
        self._version = _version(self._held)

    def kept(self) -> Tensor | None:
        """See ``HiddenStates``."""
        return self._held[0].to("cpu", copy=True) if _version(self._held) == self._version else None

    def go_on(self, states: Tensor, index: int, last: bool) -> None:
        """See ``HiddenStates``."""
        self._held[0].copy_(states)
        self._version = _version(self._held)

    def end(self) -> None:
        """See ``HiddenStates``."""
        self._held = torch.empty(0)

    def _place(self, index: int) -> Tensor:
        return self._held[:, index * self._chunk : (index + 1) * self._chunk]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class HostStates:
    """All of them in host memory, pinned for CUDA. Chunks come up ahead of the computation, and leave behind it.

    They pass through ``SLOTS`` buffers on the device in turn. A chunk's new states take the place of the old ones in
    its slot and leave from there; the chunk that comes ``SLOTS`` later is fetched into the slot when they have landed.
    Copies of one direction keep their order: by then all that left before has landed too, that chunk's states among it.
    So it is in the last layer, where nothing leaves, since its first chunks were fetched behind all that had left.
    """

    def __init__(self, device: Device, tokens: int, width: int, chunk: int, dtype: torch.dtype) -> None:
        """Room for ``tokens`` tokens, in chunks of ``chunk``."""
        self._device, self._chunk, self._width, self._dtype = device, chunk, width, dtype
        self._per_piece = max(1, PIECE_BYTES // (chunk * width * dtype.itemsize))  # chunks
        size = self._per_piece * chunk
        starts = range(0, tokens, size)
        self._pieces = [device.host_empty((1, min(size, tokens - start), width), dtype) for start in starts]
        self._pinner: Pinner | None = None
        where = device.empty((0,), dtype).device
        if where.type == "cuda":
            pin = partial(cuda_pin, device=where)
            self._pinner = Pinner(self._pieces, pin, cuda_unpin, lambda done, total: None)
        self._slots: Tensor | None = None
        self._tokens = self._chunks = self._used = 0
        self._arriving: deque[Event] = deque()
        self._sent: Event | None = None  # what left last
        self._left: list[Event | None] = []  # when each slot may be overwritten

    def begin(self, first: Tensor, tokens: int) -> None:
        """See ``HiddenStates``.

        Raises:
            UnsupportedModelError: states of another kind than there is room for.
        """
        if (first.shape[2], first.dtype) != (self._width, self._dtype):
            raise UnsupportedModelError(
                f"this model's hidden states are {first.shape[2]} numbers of {str(first.dtype)[6:]} per token where "
                f"{self._width} of {str(self._dtype)[6:]} were expected; take hidden_states='device'"
            )
        self._tokens, self._chunks, self._used = tokens, -(-tokens // self._chunk), 0
        depth = min(SLOTS, self._chunks)
        self._slots = self._device.empty((depth, 1, min(self._chunk, tokens), self._width), self._dtype)
        self._left = [None] * depth

    def take(self, index: int) -> Tensor:
        """See ``HiddenStates``."""
        self._arriving.popleft().wait()
        return self._slot(index)

    def put(self, index: int, states: Tensor, keep: bool = True) -> None:
        """See ``HiddenStates``."""
        device, depth = self._device, len(self._left)
        number, slot = self._used % depth, self._slot(index)
        if self._used < self._chunks and (left := self._left[number]) is not None:  # nothing was fetched into it
            left.wait()
        if keep:
            device.launch("put hidden states", slot.copy_, states)
            if self._pinner:
                self._pinner.wait(index // self._per_piece)
            self._left[number] = self._sent = device.outgoing.submit(self._place(index), slot, after=device.record())
        else:
            self._left[number] = device.release(slot)
        following = self._used + depth
        if following >= self._chunks and (keep or index + depth < self._chunks):
            self._fetch(following)
        self._used += 1

    def kept(self) -> Tensor | None:
        """See ``HiddenStates``. A step changes what lies in host memory only with ``put``."""
        if self._sent is not None:
            self._sent.reach()  # and with it all that left before
        return torch.cat([self._place(index)[0] for index in range(self._chunks)])

    def go_on(self, states: Tensor, index: int, last: bool) -> None:
        """See ``HiddenStates``."""
        if self._sent is not None:
            self._sent.reach()  # of a prompt that was given up
        for number in range(self._chunks):
            self._place(number).copy_(states[number * self._chunk :][: self._length(number)])
        self._used = self._chunks + index
        end = 2 * self._chunks if last else self._used + len(self._left)
        if self._pinner:
            self._pinner.wait(len(self._pieces) - 1)
        self._left = [self._device.record()] * len(self._left)  # their memory may have been somebody else's
        for use in range(self._used, min(end, self._used + len(self._left))):
            self._fetch(use)

    def _fetch(self, use: int) -> None:
        index, number = use % self._chunks, use % len(self._left)
        slot = self._slots[number][:, : self._length(index)]
        self._arriving.append(self._device.incoming.submit(slot, self._place(index), after=self._left[number]))

    def end(self) -> None:
        """See ``HiddenStates``. The slots are given back when nothing is on its way through them."""
        under_way = [*self._arriving, *self._left]
        self._arriving.clear()
        self._left = []
        try:
            for event in under_way:
                if event is not None:
                    event.wait()
        finally:
            self._slots = None

    def close(self) -> None:
        """Unpin. The device must have been closed before."""
        if self._pinner:
            self._pinner.close()

    def _length(self, index: int) -> int:
        return min(self._chunk, self._tokens - index * self._chunk)

    def _slot(self, index: int) -> Tensor:
        return self._slots[self._used % len(self._left)][:, : self._length(index)]

    def _place(self, index: int) -> Tensor:
        start = index % self._per_piece * self._chunk
        return self._pieces[index // self._per_piece][:, start : start + self._length(index)]
