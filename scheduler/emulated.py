"""A device for machines without CUDA: threads as copy engines, a link as fast as one says, and chaos on demand.

Without chaos it is how this library runs on a CPU that is to have a link (``host`` is how it runs without one): the
computation is the caller's own thread, and copies go on beside it. With ``Chaos`` it is a test bench for the order of
things: the computation, too, runs on a thread of its own as it does on CUDA, every copy and every launch is late by a
random time, and buffers are full of NaN from their release until a copy has landed in them. A wait that is missing
somewhere then gives wrong numbers.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offload_triforce.scheduler.clock import HostMark
from offload_triforce.scheduler.device import COMPUTE, D2H, H2D
from offload_triforce.scheduler.trace import Trace, host_span


@dataclass(frozen=True)
class Chaos:
    """Random delays of up to ``longest_ms`` before each copy and each piece of computation."""

    seed: int
    longest_ms: float = 0.3

    def delays(self, engine: str) -> Callable[[], None]:
        """A function that sleeps for a random time; most delays are short, some are long."""
        chance = random.Random(f"{self.seed} {engine}")
        return lambda: time.sleep(self.longest_ms * 1e-3 * chance.random() ** 3)


class _Event:
    """Something that a thread will have done; with the error, if it failed."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.at = 0.0  # when it was done
        self.error: BaseException | None = None

    def set(self) -> None:
        self.at = time.perf_counter()
        self.done.set()

    def wait(self) -> None:
        """The host waits too: on a CPU it is the host that computes."""
        self.done.wait()
        if self.error is not None:
            raise RuntimeError("a copy over the link failed") from self.error

    def arrived(self) -> bool:
        return self.done.is_set()

    reach = wait


class _Engine:
    """A thread that does one thing after the other. What has not begun when it is closed fails."""

    def __init__(self, name: str, delay: Callable[[], None] | None) -> None:
        self._delay = delay
        self._queue: queue.SimpleQueue[tuple[Callable[[], None], _Event] | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], None]) -> _Event:
        if self._closing.is_set():
            raise RuntimeError("this device has been closed")
        event = _Event()
        self._queue.put((work, event))
        return event

    def close(self) -> None:
        if not self._closing.is_set():
            self._closing.set()
            self._queue.put(None)
            self._thread.join()

    def sleep(self, seconds: float) -> None:
        """For the engine's own work: sleep, unless it is being closed."""
        self._closing.wait(seconds)

    @torch.no_grad()
    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            work, event = item
            try:
                if self._closing.is_set():
                    raise RuntimeError("the device was closed before this began")
                if self._delay:
                    self._delay()
                work()
            except Exception as error:  # handed to whoever waits
                event.error = error
            event.set()
            del item, work  # with them goes the last that refers to a copy's buffers, which somebody may have given up


class ThreadLane:
    """One direction of the link. Copies take at least ``latency_us`` plus bytes / ``gbps`` (decimal GB/s)."""

    def __init__(self, owner: EmulatedDevice, name: str) -> None:
        self.moved = 0
        self._owner, self._name = owner, name
        self._free_at = 0.0  # when the emulated link is through with all copies so far
        self._engine = _Engine(name, owner.chaos and owner.chaos.delays(name))

    def submit(
        self,
        target: Tensor,
        source: Tensor,
        after: _Event | None = None,
        first: Callable[[], None] | None = None,
        then: Callable[[], None] | None = None,
    ) -> _Event:
        """Queue a copy behind the lane's other copies and ``after``."""
        self.moved += source.numel() * source.element_size()
        submitted = time.perf_counter()
        return self._engine.submit(lambda: self._copy(target, source, after, submitted, first, then))

    def close(self) -> None:
        """Stop the thread. Copies that have not begun are dropped; waiting for one raises."""
        self._engine.close()

    def _copy(
        self,
        target: Tensor,
        source: Tensor,
        after: _Event | None,
        ready: float,
        first: Callable[[], None] | None,
        then: Callable[[], None] | None,
    ) -> None:
        if after is not None:
            after.wait()
            ready = max(ready, after.at)
        owner = self._owner
        size = source.numel() * source.element_size()
        if first is not None:
            first()
            ready = max(ready, time.perf_counter())
        with owner.span(self._name, f"{size / 1e6:.2f} MB", size):
            if owner.chaos:
                poison(target)
                owner.chaos_delay()
            move(target, source)
            self._take_time(ready, size)
        if first is not None and owner.chaos:
            poison(source)  # nobody is to read it again
        if then is not None:
            then()
            if owner.chaos:
                poison(target)

    def _take_time(self, ready: float, size: int) -> None:
        """Sleep until a link of the given speed would be through with a copy that could begin at ``ready``.

        The link works by its own clock: a copy begins when it is ready and the one before it is through, however
        late this thread woke up.
        """
        owner = self._owner
        if owner.gbps is None and not owner.latency_us:
            return
        takes = owner.latency_us * 1e-6 + (size / (owner.gbps * 1e9) if owner.gbps else 0.0)
        self._free_at = max(ready, self._free_at) + takes
        if (left := self._free_at - time.perf_counter()) > 0:
            self._engine.sleep(left)


class EmulatedDevice:
    """Threads as copy engines; ``gbps`` and ``latency_us`` describe each direction of the emulated link."""

    unified = False

    def __init__(
        self,
        gbps: float | None = None,
        latency_us: float = 0.0,
        chaos: Chaos | None = None,
        trace: Trace | None = None,
    ) -> None:
        self.gbps, self.latency_us, self.chaos, self.trace = gbps, latency_us, chaos, trace
        self.chaos_delay = chaos.delays("copy") if chaos else lambda: None
        self.incoming, self.outgoing = ThreadLane(self, H2D), ThreadLane(self, D2H)
        self._compute = _Engine(COMPUTE, chaos.delays(COMPUTE)) if chaos else None
        self._launched: list[_Event] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A staging buffer, contents undefined; under chaos, NaN."""
        buffer = torch.empty(shape, dtype=dtype)
        if self.chaos:
            poison(buffer)
        return buffer

    host_empty = empty

    def reclaim(self) -> None:
        """Nothing to do: the C library gives large blocks back at once."""

    def record(self) -> _Event:
        """The computation issued so far."""
        if self._compute:
            return self._compute.submit(lambda: None)
        event = _Event()
        event.set()
        return event

    def catch_up(self) -> None:
        """The host waits for the computation issued so far."""
        self.record().wait()

    def mark(self) -> HostMark:
        """Now: the caller computes itself. Under chaos, ``finish`` first."""
        return HostMark()

    def release(self, buffer: Tensor) -> _Event:
        """The computation issued so far was the last to use this buffer."""
        return self._compute.submit(lambda: poison(buffer)) if self._compute else self.record()

    def await_landing(self, landed: _Event) -> Callable[[], float]:
        """Wait for a copy."""
        started = time.perf_counter()
        landed.wait()
        waited = time.perf_counter() - started
        return lambda: waited

    def launch(self, name: str, work: Callable[..., None], *args: Any) -> None:
        """Compute: at once, or under chaos later and on another thread."""
        if self._compute:
            self._launched.append(self._compute.submit(lambda: work(*args)))
            return
        with self.span(COMPUTE, name):
            work(*args)

    def finish(self) -> None:
        """Wait for what was launched; raises what went wrong in it."""
        launched, self._launched = self._launched, []
        for event in launched:
            event.done.wait()
            if event.error is not None:
                raise event.error

    def span(self, track: str, name: str, size: int = 0) -> AbstractContextManager[None]:
        """Trace what is done inside."""
        return host_span(self.trace, track, name, size)

    def close(self) -> None:
        """Stop all threads. Computation that was launched is done first; copies that have not begun are dropped."""
        if self._compute:
            self._compute.close()
        self.incoming.close()
        self.outgoing.close()


def move(target: Tensor, source: Tensor) -> None:
    """Copy on this thread alone.

    torch would start a team of threads for it. That gets in the computation's way, and does so for good: OpenMP counts
    the threads of all teams, and where there are more than cores, those of the computation go to sleep after each
    operation instead of waiting for the next (SmolLM2 on 2 cores: a step of 4 tokens takes 1.4 times as long).
    """
    alike = (target.dtype, target.shape) == (source.dtype, source.shape)
    if alike and target.ndim and target.stride(-1) == source.stride(-1) == 1:
        np.copyto(target.view(torch.uint8).numpy(), source.view(torch.uint8).numpy())
    else:
        target.copy_(source)


def poison(buffer: Tensor) -> None:
    """Fill with what nobody can overlook: NaN, which is what bytes that are all ones are in every dtype."""
    buffer.fill_(float("nan") if buffer.is_floating_point() else 255 if buffer.dtype == torch.uint8 else -1)
