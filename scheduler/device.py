"""Where the computation and the copies run: one small interface, for CUDA and for machines without it.

A device has two *lanes*, one per direction of the link. Copies of a lane run in the order of submission, beside
the computation. Everything is ordered by *events*; on CUDA, the host waits for nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from offload_triforce.scheduler.clock import Mark
from offload_triforce.scheduler.staging import Staging
from offload_triforce.scheduler.trace import Span, Trace

H2D, D2H, COMPUTE = "host to device", "device to host", "compute"
VERIFY, DRAFT = "verification pass", "draft step"  # levels 2 and 1 as a whole

_UNTRACED = nullcontext()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host's, on the device. Nobody waits for it; nor does a small one wait for tiles on the link."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device, non_blocking=True)
    staging = _staging(_index(device))
    if not staging.takes(tensor):
        return tensor.pin_memory().to(device, non_blocking=True)
    with on(device):
        return staging.bring(tensor)


@functools.cache
def _staging(index: int) -> Staging:
    return Staging.on(torch.device("cuda", index))


class Event(Protocol):
    """A point in the work of a lane or of the computation."""

    def wait(self) -> None:
        """Let the computation that is issued from now on start after this point."""

    def arrived(self) -> bool:
        """Whether that point has been reached already. The host does not wait."""

    def reach(self) -> None:
        """The host waits until this point."""


class Lane(Protocol):
    """One direction of the link."""

    moved: int  # bytes so far

    def submit(
        self,
        target: Tensor,
        source: Tensor,
        after: Event | None = None,
        first: Callable[[], None] | None = None,
        then: Callable[[], None] | None = None,
    ) -> Event:
        """Queue a copy behind the lane's other copies and ``after``. The event says that it has landed.

        ``first`` and ``then`` are computation on the device before the copy and after it, in the order of the lane: so
        one buffer serves all copies of a lane, and the computation beside it does not wait. The event is after both.
        What they read and write must stay until the event.
        """


class Device(Protocol):
    """The computation and both lanes.

    ``unified``: its memory and host memory are the same, so that tiles are attended to where they lie.
    """

    unified: bool
    incoming: Lane  # host to device
    outgoing: Lane  # device to host
    trace: Trace | None  # where spans are written down, if anywhere

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A staging buffer on the device, contents undefined."""

    def host_empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A buffer in host memory, contents undefined, not pinned."""

    def reclaim(self) -> None:
        """What has been freed on the device may be allocated again in pieces of any size. The host waits."""

    def record(self) -> Event:
        """The computation issued so far."""

    def catch_up(self) -> None:
        """The host waits for the computation issued so far."""

    def mark(self) -> Mark:
        """The end of the computation issued so far, to tell the time by (see ``clock``)."""

    def release(self, buffer: Tensor) -> Event:
        """The computation issued so far was the last to use this buffer: a copy may overwrite it after the event."""

    def await_landing(self, landed: Event) -> Callable[[], float]:
        """Let the computation from now on wait for a copy. The result tells, once it is over, for how many seconds."""

    def launch(self, name: str, work: Callable[..., None], *args: Any) -> None:
        """Issue computation. It may run later, in the order of issue; ``finish`` before issuing any without this."""

    def finish(self) -> None:
        """Let computation issued without ``launch`` come after all that was launched."""

    def span(self, track: str, name: str, size: int = 0) -> AbstractContextManager[None]:
        """Trace what is issued inside, if there is a trace."""

    def close(self) -> None:
        """Let what is under way end. Waiting for a copy that never began raises."""


class _CudaEvent:
    def __init__(self, event: torch.cuda.Event, owner: CudaDevice) -> None:
        self.event, self._owner = event, owner

    def wait(self) -> None:
        self._owner.stream().wait_event(self.event)

    def arrived(self) -> bool:
        return self.event.query()

    def reach(self) -> None:
        self.event.synchronize()


class _CudaMark:
    """An event of the computation that is timed."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def since(self, earlier: _CudaMark) -> float:
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1e3


class CudaLane:
    """A copy engine of a CUDA device, driven by a stream of its own. Host tensors have to be pinned."""

    def __init__(self, owner: CudaDevice, name: str) -> None:
        self.moved = 0
        self._owner, self._name = owner, name
        self._stream = torch.cuda.Stream(owner.device)

    def submit(
        self,
        target: Tensor,
        source: Tensor,
        after: _CudaEvent | None = None,
        first: Callable[[], None] | None = None,
        then: Callable[[], None] | None = None,
    ) -> _CudaEvent:
        """Queue a copy. torch gathers a strided source on the device first, on this lane's stream."""
        if after is not None:
            self._stream.wait_event(after.event)
        size = source.nbytes
        with self._owner.under(self._stream), self._owner.span(self._name, f"{size / 1e6:.1f} MB", size):
            if first is not None:
                first()
            self._copy(target, source)
            if then is not None:
                then()
            landed = self._stream.record_event(torch.cuda.Event(enable_timing=True))
        if source.is_cuda:
            source.record_stream(self._stream)  # the allocator must not reuse it before the copy is through
        self.moved += size
        return _CudaEvent(landed, self._owner)

    def _copy(self, target: Tensor, source: Tensor) -> None:
        """On the current stream, which is this lane's."""
        target.copy_(source, non_blocking=True)

    def close(self) -> None:
        """Let what is under way land."""
        self._stream.synchronize()


class CudaDevice:
    """A CUDA device: the current stream computes, each lane has a stream of its own."""

    unified = False

    def __init__(self, device: torch.device, trace: Trace | None = None) -> None:
        self.device, self.trace = device, trace
        self._index = _index(device)
        self._streams: dict[int, torch.cuda.Stream] = {}
        self.incoming, self.outgoing = CudaLane(self, H2D), CudaLane(self, D2H)
        self._origin = self.stream().record_event(torch.cuda.Event(enable_timing=True))

    def stream(self) -> torch.cuda.Stream:
        """The current stream of this device: where the computation is issued.

        A pass asks several times per tile, and torch looks its device up and makes a new object each time, which costs
        more than a launch. So torch is asked for the handle alone, as compiled code of its own does.
        """
        handle = torch._C._cuda_getCurrentRawStream(self._index)
        if handle not in self._streams:
            self._streams[handle] = torch.cuda.current_stream(self.device)
        return self._streams[handle]

    def under(self, stream: torch.cuda.Stream) -> AbstractContextManager[None]:
        """What is issued inside goes to this stream, one of this device."""
        if torch.cuda.current_device() != self._index:  # as never within a pass: see ``on``
            return torch.cuda.stream(stream)
        return _Under(self, stream)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A staging buffer on the device, contents undefined."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def host_empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A buffer in host memory, contents undefined, not pinned yet (see ``pinning``)."""
        return torch.empty(shape, dtype=dtype, device="cpu")

    def reclaim(self) -> None:
        """torch keeps what is freed, in segments of the sizes that it was asked for: they go back to the driver."""
        torch.cuda.synchronize(self.device)  # what a lane still reads is not free before
        torch.cuda.empty_cache()

    def record(self) -> _CudaEvent:
        """The computation issued so far."""
        return _CudaEvent(self.stream().record_event(), self)

    def catch_up(self) -> None:
        """The host waits for the current stream."""
        self.stream().synchronize()

    def mark(self) -> _CudaMark:
        """The end of the computation issued so far. Work that was queued before a mark is not counted after it."""
        return _CudaMark(self.stream().record_event(torch.cuda.Event(enable_timing=True)))

    def release(self, buffer: Tensor) -> _CudaEvent:
        """The computation issued so far was the last to use this buffer."""
        return self.record()

    def await_landing(self, landed: _CudaEvent) -> Callable[[], float]:
        """Let the computation from now on wait for a copy. It goes on at once if the copy was the earlier one."""
        reached = self.stream().record_event(torch.cuda.Event(enable_timing=True))
        landed.wait()
        return lambda: max(0.0, reached.elapsed_time(landed.event) / 1e3)

    def launch(self, name: str, work: Callable[..., None], *args: Any) -> None:
        """Issue computation: CUDA calls return at once by themselves."""
        with self.span(COMPUTE, name):
            work(*args)

    def finish(self) -> None:
        """Nothing to do: one stream keeps the order."""

    def span(self, track: str, name: str, size: int = 0) -> AbstractContextManager[None]:
        """Time what the current stream is given inside, if there is a trace."""
        return _UNTRACED if self.trace is None else _CudaSpan(self, self.trace, track, name, size)

    def seconds(self, event: torch.cuda.Event) -> float:
        """When an event happened, since the device was set up. The event must be over."""
        return self._origin.elapsed_time(event) / 1e3

    def close(self) -> None:
        """Let what is under way land."""
        try:
            self.incoming.close()
        finally:
            self.outgoing.close()


class _Under:
    """Makes a stream of the current device the current one. ``torch.cuda.stream`` asks for both each time."""

    def __init__(self, owner: CudaDevice, stream: torch.cuda.Stream) -> None:
        self._stream, self._before = stream, owner.stream()

    def __enter__(self) -> None:
        torch.cuda.set_stream(self._stream)

    def __exit__(self, *_: object) -> None:
        torch.cuda.set_stream(self._before)


class _CudaSpan:
    def __init__(self, owner: CudaDevice, trace: Trace, track: str, name: str, size: int) -> None:
        self._owner, self._trace, self._what = owner, trace, (track, name, size)

    def __enter__(self) -> None:
        self._start = self._mark()

    def __exit__(self, *_: object) -> None:
        owner, (track, name, size), start, end = self._owner, self._what, self._start, self._mark()
        self._trace.add_later(lambda: Span(track, name, owner.seconds(start), owner.seconds(end), size))

    def _mark(self) -> torch.cuda.Event:
        return self._owner.stream().record_event(torch.cuda.Event(enable_timing=True))


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def on(device: torch.device) -> AbstractContextManager[None]:
    """Make a CUDA device the current one: Triton launches its kernels there, wherever their tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
