"""Small tensors on their way to the device: pinned memory in which each waits until a kernel has read it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from offload_triforce.kernels import ops

# Larger ones are copied: a kernel reads host memory more slowly than the copy engine.
SLOT = 64 << 10  # bytes
SLOTS = 32


class Passed(Protocol):
    """A point in the device's work, as torch.cuda.Event."""

    def synchronize(self) -> None:
        """Wait until it has been reached."""


class Staging:
    """A ring of slots in pinned host memory, for small tensors of the host's.

    A slot is written again once the device has read what was in it: so many tensors later, the host hardly ever waits.
    """

    def __init__(self, device: torch.device, memory: Tensor, record: Callable[[], Passed]) -> None:
        """``memory``: bytes [slots, size], pinned. ``record``: marks the end of the computation issued so far."""
        self.device, self._memory, self._record = device, memory, record
        self._read: list[Passed | None] = [None] * len(memory)
        self._next = 0
        self._lock = threading.Lock()  # of several engines on one device

    @classmethod
    def on(cls, device: torch.device) -> Staging:
        """Of a CUDA device."""
        memory = torch.empty(SLOTS, SLOT, dtype=torch.uint8, device="cpu", pin_memory=True)
        return cls(device, memory, lambda: torch.cuda.current_stream(device).record_event())

    def takes(self, tensor: Tensor) -> bool:
        """Whether it is small enough."""
        return tensor.nbytes <= self._memory.shape[1]

    def bring(self, tensor: Tensor) -> Tensor:
        """A tensor of the host's on the device, for the computation issued from now on."""
        target = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
        if not tensor.numel():
            return target
        with self._lock:
            slot, self._next = self._next, (self._next + 1) % len(self._memory)
            read = self._read[slot]
            if read is not None:
                read.synchronize()
            staged = self._memory[slot, : tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            staged.copy_(tensor)
            ops.fetch(target, staged)
            self._read[slot] = self._record()
        return target
