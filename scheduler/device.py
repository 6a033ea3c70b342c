"""Copy engines: one interface, for CUDA and for machines without it.

A *lane* copies in one direction, in the order of submission, beside the computation. ``CudaLane`` is a CUDA
stream; ``ThreadLane`` is a thread that copies memory and, when a bandwidth is given, takes as long as a link
of that speed would.
"""

from __future__ import annotations

import queue
import threading
import time
from typing import Protocol

import torch
from torch import Tensor


class Copy(Protocol):
    """A copy under way."""

    def wait(self) -> None:
        """Let the computation go on only once the copy has landed. On CUDA the host does not block."""


class Lane(Protocol):
    """One direction of the link."""

    moved: int  # bytes so far

    def submit(self, target: Tensor, source: Tensor) -> Copy:
        """Queue a copy. It starts after the copies before it and the computation issued so far."""

    def close(self) -> None:
        """Stop. Nothing is under way afterwards; waiting for a copy that was dropped raises."""


class _EventCopy:
    def __init__(self, event: torch.cuda.Event, device: torch.device) -> None:
        self._event, self._device = event, device

    def wait(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)


class CudaLane:
    """A copy engine of a CUDA device, driven by a stream of its own. Host tensors have to be pinned."""

    def __init__(self, device: torch.device) -> None:
        self.moved = 0
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def submit(self, target: Tensor, source: Tensor) -> Copy:
        """Queue a copy. It starts after the copies before it and the computation issued so far."""
        issued = torch.cuda.current_stream(self._device).record_event()
        self._stream.wait_event(issued)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            landed = self._stream.record_event()
        for tensor in (target, source):
            if tensor.is_cuda:
                tensor.record_stream(self._stream)  # the allocator must not reuse it before the copy is through
        self.moved += source.numel() * source.element_size()
        return _EventCopy(landed, self._device)

    def close(self) -> None:
        """Let what is under way land."""
        self._stream.synchronize()


class _ThreadCopy:
    def __init__(self, target: Tensor, source: Tensor) -> None:
        self.target, self.source = target, source
        self.landed = threading.Event()
        self.error: BaseException | None = None

    def wait(self) -> None:
        self.landed.wait()
        if self.error is not None:
            raise RuntimeError("a copy over the link failed") from self.error


class ThreadLane:
    """A copy engine for the CPU: a thread. ``gbps`` (GB/s, decimal) makes copies take at least bytes / gbps."""

    def __init__(self, gbps: float | None = None, name: str = "link") -> None:
        self.moved = 0
        self._bytes_per_second = gbps * 1e9 if gbps else None
        self._free_at = 0.0  # when the emulated link is through with all copies so far
        self._queue: queue.SimpleQueue[_ThreadCopy | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, target: Tensor, source: Tensor) -> Copy:
        """Queue a copy. The computation issued so far is through: on a CPU, calls return when they are done."""
        if self._closed:
            raise RuntimeError("this lane has been closed")
        copy = _ThreadCopy(target, source)
        self.moved += source.numel() * source.element_size()
        self._queue.put(copy)
        return copy

    def close(self) -> None:
        """Stop the thread. Copies that have not begun are dropped; waiting for one raises."""
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (copy := self._queue.get()) is not None:
            try:
                if self._closed:
                    raise RuntimeError("the lane was closed before this copy began")
                started = time.perf_counter()
                with torch.no_grad():
                    copy.target.copy_(copy.source)
                self._take_time(started, copy.source.numel() * copy.source.element_size())
            except Exception as error:  # handed to whoever waits
                copy.error = error
            copy.landed.set()

    def _take_time(self, started: float, size: int) -> None:
        """Sleep until a link of the given speed would be through. Oversleeping is made up for by the next copy."""
        if self._bytes_per_second is None:
            return
        idle_before = started - self._free_at > 0.02  # longer than an oversleep: the link really was idle
        self._free_at = (started if idle_before else self._free_at) + size / self._bytes_per_second
        if (left := self._free_at - time.perf_counter()) > 0:
            time.sleep(left)


def make_lane(device: torch.device, gbps: float | None, name: str) -> Lane:
    """A lane for ``device``. ``gbps`` emulates a slower link and is for the CPU only."""
    return CudaLane(device) if device.type == "cuda" else ThreadLane(gbps, name)
