"""Device memory that tiles pass through: regions of one buffer, handed out in turn and given back in the same order."""

from __future__ import annotations

from collections import deque

from torch import Tensor

from offload_triforce.scheduler.device import Event


class Ring:
    """Regions of one buffer. They may differ in size: a tile that could not be coded takes more than the others.

    What is given back may be overwritten after an event. Events come in order, so whoever waits for the newest has
    waited for all. Where the ring is full, as it is throughout a pass, that is the region's own.
    """

    def __init__(self, memory: Tensor) -> None:
        """``memory``: bytes (n,) on the device."""
        self._memory, self._total = memory, len(memory)
        self._out: deque[tuple[int, int]] = deque()  # (begin, end) of regions that are in use, oldest first
        self._free: Event | None = None
        self._views: dict[tuple[int, int], Tensor] = {}  # there are few, and the host makes each only once

    def begin(self, free: Event) -> None:
        """All of it may be overwritten after the event."""
        self._out.clear()
        self._free = free

    def take(self, size: int) -> tuple[Tensor, Event] | None:
        """A region of ``size`` bytes, and when it may be overwritten; None until more has been given back."""
        start = self._start(size)
        if start is None:
            return None
        self._out.append((start, start + size))
        return self._view(start, size), self._free

    def give_back(self, free: Event) -> None:
        """The oldest region may be overwritten after the event."""
        self._out.popleft()
        self._free = free

    def _start(self, size: int) -> int | None:
        """Where there is room: behind the newest region, or at the beginning; never over the oldest one."""
        if not self._out:
            return 0 if size <= self._total else None
        oldest, newest = self._out[0][0], self._out[-1][1]
        if newest <= oldest:  # those in use go round the end
            return newest if newest + size <= oldest else None
        if newest + size <= self._total:
            return newest
        return 0 if size <= oldest else None

    def _view(self, start: int, size: int) -> Tensor:
        if (start, size) not in self._views:
            self._views[start, size] = self._memory[start : start + size]
        return self._views[start, size]
